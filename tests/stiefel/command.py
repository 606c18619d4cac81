"""The command as tests call it, and the recipes that come with it."""

from pathlib import Path

from click.testing import CliRunner, Result

from stiefel.cli import main

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def stiefel(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
