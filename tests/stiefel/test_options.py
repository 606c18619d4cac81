"""Options made from settings classes bear the same names, defaults and checks."""

from typing import Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

from converter.settings import Settings
from stiefel.options import collect, settings_options


class Inner(Settings):
    depth: int = Field(3, ge=1, description="how deep")


class Outer(Settings):
    name: Literal["outer"] = Field("outer", description="a tag, no option")
    rate: float = Field(0.1, gt=0, description="how fast")
    kind: Literal["slow", "fast"] = Field("slow", description="which")
    quiet: bool = Field(False, description="say less")
    sizes: tuple[int, ...] = Field((1, 8), description="how large")
    limit: int | None = Field(None, ge=1, description="at most")
    inner: Inner = Field(default_factory=Inner, description="nested")


@click.command()
@settings_options(Outer)
def command(**values):
    print(collect(Outer, values).model_dump_json())


def invoke(*arguments: str):
    return CliRunner().invoke(command, arguments)


def test_without_options_the_defaults_stand():
    assert invoke().output.strip() == Outer().model_dump_json()


def test_options_reach_every_kind_of_field():
    result = invoke(
        *("--rate", "0.5", "--kind", "fast", "--quiet", "--sizes", "2, 4", "--limit", "7"),
        *("--inner-depth", "9"),
    )
    expected = Outer(rate=0.5, kind="fast", quiet=True, sizes=(2, 4), limit=7, inner=Inner(depth=9))
    assert result.output.strip() == expected.model_dump_json()


def test_none_turns_an_optional_field_off():
    assert '"limit":null' in invoke("--limit", "none").output


def test_none_is_a_list_of_none():
    assert '"sizes":[]' in invoke("--sizes", "none").output


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("--rate", "-1"), "--rate '-1'"),
        (("--rate", "inf"), "--rate 'inf'"),
        (("--rate", "nan"), "--rate 'nan'"),
        (("--inner-depth", "0"), "--inner-depth '0'"),
        (("--sizes", "1,two"), "--sizes"),
        (("--kind", "middling"), "--kind"),
        (("--nmae", "x"), "--nmae"),
    ],
)
def test_a_wrong_value_is_wrong_usage_and_names_the_option(arguments, culprit):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert culprit in result.output
    assert "Traceback" not in result.output


def test_help_shows_description_and_default():
    help_text = " ".join(invoke("--help").output.split())
    assert "how fast [default: 0.1]" in help_text
    assert "--inner-depth VALUE how deep [default: 3]" in help_text
    assert "--name" not in help_text
