import click
import pytest
from click.testing import CliRunner

from benchmarks.command_line import Listed, Script
from converter.errors import StiefelError


@click.command(cls=Script)
@click.option("--names", type=Listed(click.Choice(["a", "b"])), default="a,b")
@click.option("--shares", type=Listed(float))
def script(names, shares):
    if shares == (0.0,):
        raise StiefelError("nothing is left")
    print(names, shares)


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ([], "('a', 'b') None"),
        (["--names", "b", "--shares", "0.5, 1"], "('b',) (0.5, 1.0)"),
        (["--names", ""], "() None"),
    ],
)
def test_values_separated_by_commas_arrive_as_a_tuple(words, printed):
    assert CliRunner().invoke(script, words).output.strip() == printed


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--names", "a,c"], "'c' is not one of"), (["--shares", "x"], "'x' is not a valid float")],
)
def test_a_value_that_is_no_such_thing_is_wrong_usage(words, said):
    result = CliRunner().invoke(script, words)
    assert result.exit_code == 2
    assert said in result.output


def test_what_a_user_can_put_right_is_one_line_without_a_traceback():
    result = CliRunner().invoke(script, ["--shares", "0"])
    assert result.exit_code == 1
    assert result.output == "Error: nothing is left\n"
