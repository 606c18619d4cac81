"""A wrong key or value is told with its line and the nearest right name."""

from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field, ValidationError, model_validator

from converter.settings import Settings
from stiefel.validation import describe, line_of


class One(Settings):
    name: Literal["one"] = Field("one", description="")
    alpha: float = Field(0.0, ge=0, description="")


class Two(Settings):
    name: Literal["two"] = Field("two", description="")
    gamma: float = Field(0.0, description="")


class Odds(Settings):
    low: int = Field(0, description="")
    high: int = Field(0, description="")

    @model_validator(mode="after")
    def _consistent(self):
        if self.high < self.low:
            raise ValueError("high is below low")
        return self


class Section(Settings):
    odds: Odds = Field(Odds(), description="")
    rule: Annotated[One | Two, Field(discriminator="name")] = Field(One(), description="")
    sizes: tuple[int, ...] = Field((1,), description="")
    epochs: int = Field(1, ge=1, description="")


class Document(Settings):
    train: Section | None = Field(None, description="")
    need: int = Field(description="")


def complaint(text: str) -> tuple[str, int | None]:
    with pytest.raises(ValidationError) as caught:
        Document.model_validate(yaml.safe_load(text))
    problem = caught.value.errors()[0]
    return describe(problem, Document), line_of(yaml.compose(text), problem["loc"])


def test_a_misspelt_key_is_named_with_its_line_and_the_right_one():
    message, line = complaint("need: 1\ntrain:\n  epochs: 2\n  epohcs: 3\n")
    assert message == "unknown key 'train.epohcs'; did you mean epochs?"
    assert line == 4


def test_a_misspelt_key_inside_a_rule_is_looked_for_among_that_rule_s_keys():
    message, line = complaint("need: 1\ntrain:\n  rule:\n    name: one\n    alfa: 1\n")
    assert message == "unknown key 'train.rule.alfa'; did you mean alpha?"
    assert line == 5


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("nmae: one", "unknown key 'train.rule.nmae'; did you mean name?"),
        ("name: own", "'train.rule.name' is 'own'; did you mean one?"),
        ("name: zero", "'train.rule.name' is 'zero'; known here: one, two"),
        ("alpha: 1", "'train.rule' needs a name: one of one, two"),
    ],
)
def test_a_rule_is_known_by_its_name(rule, says):
    assert complaint(f"need: 1\ntrain:\n  rule:\n    {rule}\n")[0] == says


def test_values_that_do_not_go_together_are_told_without_the_whole_section():
    message, line = complaint("need: 1\ntrain: {odds: {low: 2, high: 1}}\n")
    assert (message, line) == ("train.odds: high is below low", 2)


def test_a_key_like_no_other_lists_what_is_known():
    message, _ = complaint("need: 1\nzzz: 1\n")
    assert message == "unknown key 'zzz'; known here: need, train"


def test_a_wrong_value_is_shown_with_what_would_be_right():
    message, line = complaint("need: 1\ntrain:\n  epochs: 0\n")
    assert message == "'train.epochs' is 0: input should be greater than or equal to 1"
    assert line == 3


def test_an_element_of_a_list_is_found_by_its_line():
    message, line = complaint("need: 1\ntrain:\n  sizes:\n    - 1\n    - big\n")
    assert message.startswith("'train.sizes.1' is 'big'")
    assert line == 5


def test_a_missing_key_is_named():
    message, _ = complaint("train: {}\n")
    assert message == "'need' is missing"
