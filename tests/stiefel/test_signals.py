"""An interrupted command ends with one line and 130, and says how to go on."""

import shlex
import subprocess
import sys

import pytest

from stiefel.run_folder import open_folder
from tests.stiefel.command import RECIPES, stiefel


def test_an_interrupted_run_prints_the_very_command_that_goes_on_with_it(tmp_path, monkeypatch):
    recipe, folder = tmp_path / "my recipe.yaml", tmp_path / "run 11"
    recipe.write_text("model: {name: zoo:digits}\ndata: {source: digits}\n")
    calls = []

    def interrupt(recipe, folder, console, *, resume):
        calls.append((recipe, folder))
        open_folder(folder, recipe, resume=resume)
        raise KeyboardInterrupt

    monkeypatch.setattr("stiefel.cli.run", interrupt)
    sets = ("--set", "seed=7", "--set", "convert={rank: 8, calibrate: null}")
    result = stiefel("run", recipe, *sets, "--out", folder)
    assert result.exit_code == 130
    command = result.stderr.split("go on with: ")[1].splitlines()[0]
    name, *arguments = shlex.split(command)
    assert (name, arguments[-1]) == ("stiefel", "--resume")
    assert stiefel(*arguments).exit_code == 130
    assert calls[0] == calls[1]


def test_an_interrupt_before_there_is_anything_to_resume_suggests_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("stiefel.cli.run", interrupt)
    result = stiefel("run", RECIPES / "digits.yaml", "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert "go on with" not in result.stderr


def test_an_interrupted_command_exits_with_130(small, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("stiefel.cli.evaluate", interrupt)
    result = stiefel("evaluate", small, "--data", "digits")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.{name}, signal.SIG_DFL)  # a background process may ignore it
import stiefel.__main__ as command
sys.argv[1:] = ["doctor"]
ask = lambda *_: os.kill(os.getpid(), signal.{name})
{when}
command.main()
"""


LOADING = "sys.meta_path.insert(0, type('Finder', (), {'find_spec': ask}))"


WORKING = "import stiefel.cli; stiefel.cli.doctor = ask"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("when", "says"),
    [
        (LOADING, "interrupted before it began"),
        pytest.param(WORKING, "interrupted; what was finished is kept", marks=pytest.mark.slow),
    ],
    ids=["loading", "working"],
)
def test_a_signal_ends_a_command_with_one_line_and_130_at_any_time(name, when, says):
    script = INTERRUPTED.format(name=name, when=when)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, f"stiefel: {says}\n")
