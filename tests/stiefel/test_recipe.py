"""A recipe is read whole, with every default, or refused in one line."""

from pathlib import Path

import pytest

from converter.errors import StiefelError
from converter.specs import InputSpec, spec_of
from stiefel.materials import build
from stiefel.recipe import load_recipe, resolved, save_recipe
from tests.stiefel.command import RECIPES


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_recipe_is_valid(path):
    assert load_recipe(path).name


@pytest.mark.parametrize("changes", [(), ("pretrain=off", "convert=off", "export=off")])
def test_a_resolved_recipe_read_again_is_the_same(tmp_path, changes):
    recipe = load_recipe(RECIPES / "digits.yaml", changes)
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_recipe_may_name_a_part_of_the_models_input(tmp_path):
    recipe = load_recipe(RECIPES / "digits.yaml", ("model.input={mean: [0.5]}",))
    save_recipe(recipe, tmp_path / "again.yaml")
    for one in (recipe, load_recipe(tmp_path / "again.yaml")):
        assert spec_of(build(one.model)).input == InputSpec(
            shape=(1, 8, 8), mean=(0.5,), std=(1.0,)
        )


@pytest.mark.parametrize(
    "said", ["args={a: 1}", "weights=DEFAULT", "input={mean: [0.5]}", "rename=[a=b]", "variant=ema"]
)
def test_a_checkpoint_of_ours_says_itself_what_it_holds(tmp_path, said):
    text = "model: {checkpoint: ours.safetensors}"
    recipe = load_recipe(write(tmp_path, text), (f"model.{said}",))
    with pytest.raises(StiefelError, match=f"model.{said.split('=')[0]} goes with model.name"):
        build(recipe.model)


def test_absent_sections_are_skipped_and_empty_ones_take_their_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path, "model: {name: zoo:mlp}\nconvert:\n"))
    assert recipe.train is None
    assert recipe.convert.rank == "params=0.5"
    assert resolved(recipe)["convert"]["scheme"] == "spatial"


def test_changes_reach_nested_keys_and_switch_sections_off():
    recipe = load_recipe(
        RECIPES / "digits.yaml", ("train.rule.alpha=0.5", "convert.rank=8", "bench=off")
    )
    assert recipe.train.rule.alpha == 0.5
    assert recipe.convert.rank == "8"
    assert recipe.bench is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {name: zoo:mlp}", "line 1: unknown key 'modle'; did you mean model?"),
        ("model: {name: zoo:mlp}\ntrain:\n  epochs: 0\n", "line 3: 'train.epochs' is 0"),
        (
            "model: {name: zoo:mlp}\ntrain: {rule: {name: sssa}}",
            "'train.rule.name' is 'sssa'; did you mean ssa?",
        ),
        ("model: {name: zoo:mlp}\ntrain: {seed: 3}", "write seed once, at the top"),
        ("name: x", "'model' is missing"),
        ("model: {name: zoo:mlp}\nname: a\nname: b", "line 3: 'name' is there twice"),
        ("model: {name: zoo:mlp}\ntrain:\n  lr: 1\n  lr: 2", "line 4: 'lr' is there twice"),
        (
            "model: {name: zoo:mlp}\ntrain: {ranks: {floor: 3}}",
            "line 2: train.ranks: floor says how ranks fall: give final or energy too",
        ),
        ("model: {name: zoo:mlp}\ntrain:\n  early_stop: yes", "early_stop is a number, not yes"),
        ("model: {name: zoo:mlp}\ntrain: {rule: {name: ssa, readout_layers: off}}", "not no"),
        ("name: x\nmodel: &m {name: zoo:mlp, args: *m}", "line 2: an alias stands within what it"),
        ("model: {name: zoo:mlp, args: {a: &a [*a]}}", "line 1: an alias stands within what it"),
        ("- a\n- b", "a recipe is a mapping"),
        ("model: {name: [", "not valid YAML"),
    ],
)
def test_a_faulty_recipe_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(StiefelError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_alias_may_stand_beside_what_it_names(tmp_path):
    text = "model: {name: zoo:mlp}\npretrain: &short {epochs: 2}\ntrain: *short"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.pretrain.epochs == recipe.train.epochs == 2


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StiefelError, match=r"cannot read recipe .*nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("change", ["epochs", "=3", "name.epochs=3"])
def test_a_change_that_is_none_is_refused(change):
    with pytest.raises(StiefelError):
        load_recipe(RECIPES / "digits.yaml", (change,))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("train.epoch=3", r"^train\.epoch=3: .* did you mean epochs"),
        ("train.rule.alpha=-1", r"^train\.rule\.alpha=-1: 'train\.rule\.alpha' is -1"),
    ],
)
def test_a_wrong_change_is_named_itself_not_a_line_of_the_file(change, says, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: zoo:mlp}\ntrain:\n  epochs: 2\n  rule: {name: ssa}\n")
    with pytest.raises(StiefelError, match=says) as caught:
        load_recipe(path, (change,))
    assert "line" not in str(caught.value)
