"""A run is gone on with by the recipe that made what it holds, and nothing else is touched."""

import json

import pytest

from converter.errors import StiefelError
from stiefel.recipe import Recipe, load_recipe
from stiefel.run_folder import keep, open_folder

RECIPE = {
    "model": {"name": "zoo:digits"},
    "pretrain": {"epochs": 1},
    "convert": {},
    "train": {},
    "bench": {},
}


def recipe(**sections) -> Recipe:
    return Recipe.model_validate(RECIPE | sections)


@pytest.fixture
def begun(tmp_path):
    """A run that has come as far as the figures and training states say."""

    def make(*stages, training=()):
        folder = tmp_path / "run"
        open_folder(folder, recipe(), resume=False)
        keep(folder, recipe(), {stage: {} for stage in stages})
        for name in training:
            (folder / name).mkdir()
            (folder / name / "state.pt").touch()
        return folder

    return make


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("stages", "training", "change"),
    [
        ((), (), {"seed": 1}),
        ((), (), {"pretrain": {"epochs": 2}}),
        (("dense",), ("pretraining",), {"convert": {"rank": "8"}}),
        (("dense",), ("pretraining",), {"convert": None, "train": {"rule": {"name": "bp"}}}),
        (("dense", "converted"), (), {"train": {"epochs": 3}}),
        (("dense", "converted"), ("training",), {"export": {}}),
        (("dense", "converted", "trained"), ("training",), {"export": {}, "bench": None}),
    ],
)
def test_sections_of_stages_that_have_not_begun_may_be_corrected(begun, stages, training, change):
    folder = begun(*stages, training=training)
    corrected = recipe(**change)
    assert open_folder(folder, corrected, resume=True) == {stage: {} for stage in stages}
    assert load_recipe(folder / "recipe.yaml") == corrected
    # What is done from now on is done by the corrected recipe.
    assert open_folder(folder, corrected, resume=True) == {stage: {} for stage in stages}


@pytest.mark.parametrize(
    ("stages", "training", "change", "culprit"),
    [
        ((), ("pretraining",), {"seed": 1}, "its seed differs"),
        ((), ("pretraining",), {"pretrain": {"epochs": 2}}, "its pretrain differs"),
        (("dense",), (), {"pretrain": None}, "its pretrain differs"),
        (("dense",), (), {"model": {"name": "zoo:mlp"}}, "its model differs"),
        (("dense", "converted"), (), {"convert": {"rank": "8"}}, "its convert differs"),
        (("dense", "converted"), ("training",), {"train": {"epochs": 3}}, "remove .*training to"),
        (("dense", "converted", "trained"), (), {"train": {"epochs": 3}}, "its train differs"),
        (("dense", "converted", "trained", "bench"), (), {"export": {}}, "its export differs"),
        (("dense", "converted", "export"), (), {"train": {"epochs": 3}}, "or name another --out"),
    ],
)
def test_sections_that_the_run_went_by_may_not_differ_and_all_is_left_as_it_was(
    begun, stages, training, change, culprit
):
    folder = begun(*stages, training=training)
    before = contents(folder)
    with pytest.raises(StiefelError, match="holds a run of another recipe") as caught:
        open_folder(folder, recipe(**change), resume=True)
    assert caught.match(culprit)
    assert contents(folder) == before


@pytest.mark.parametrize("state", [None, "no json", "[]", json.dumps({"recipe": {}})])
def test_a_folder_that_holds_no_run_is_not_resumed_and_left_alone(tmp_path, state):
    (tmp_path / "notes.txt").write_text("mine")
    if state is not None:
        (tmp_path / "state.json").write_text(state)
    before = contents(tmp_path)
    message = "nothing to resume" if state is None else "can't be read"
    with pytest.raises(StiefelError, match=message):
        open_folder(tmp_path, recipe(), resume=True)
    assert contents(tmp_path) == before


def test_a_folder_that_is_not_there_is_not_resumed_and_not_made(tmp_path):
    with pytest.raises(StiefelError, match="nothing to resume"):
        open_folder(tmp_path / "run", recipe(), resume=True)
    assert not (tmp_path / "run").exists()
