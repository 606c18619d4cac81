"""What can be found wrong with a recipe is found before anything is trained."""

import re

import pytest
import torch

from converter.checkpoints import save_factored
from converter.convert import convert, plan
from converter.errors import StiefelError
from converter.models import load
from export import runtimes
from stiefel import run as running
from stiefel.console import Console
from stiefel.materials import example_of
from stiefel.preflight import check
from stiefel.recipe import Recipe

RECIPE = {
    "device": "cpu",
    "data": {"source": "digits", "limit_train": 100, "limit_test": 20},
    "model": {"name": "zoo:digits"},
    "pretrain": {"epochs": 1},
}
SSA = {"name": "ssa"}
MISTAKES = [
    ({"convert": {"rank": "params=5"}}, "rank 'params=5' is not understood"),
    ({"convert": {"rank": "half"}}, "rank 'half' is not understood"),
    ({"convert": {"rank": "params=0.01"}}, "out of reach: with every layer at its smallest"),
    ({"convert": {"rank": "macs=0.01"}}, "out of reach: with every layer at its smallest"),
    ({"convert": {"rank": "9999"}}, "rank 9999 is not possible"),
    ({"convert": {"layers": {"featres.*": "keep"}}}, "no layer matches 'featres.*'"),
    ({"convert": {"layers": {"features.3": {"rank": 9999}}}}, "features.3: rank 9999"),
    ({"convert": {"layers": {"features.3": {"rank": "nil"}}}}, "rank 'nil' is not understood"),
    ({"convert": {"calibrate": "imagefolder:nowhere"}}, "nowhere"),
    ({"train": {"rule": SSA}}, "no factored layer to train with rule ssa"),
    ({"convert": {"rank": "0.5", "layers": {"*": "keep"}}, "train": {}}, "no factored layer"),
    ({"train": {"rule": {"name": "bp"}, "ranks": {"final": "4"}}}, "no factored layer"),
    ({"convert": {}, "train": {"rule": SSA | {"blocks": ["bloks.*"]}}}, "matches bloks"),
    (
        {"convert": {}, "train": {"rule": SSA | {"boundaries": "units", "memory": 0.3}}},
        "memory says how far blocks are balanced, and boundaries are units",
    ),
    (
        {"convert": {"rank": "params=0.5"}, "train": {"ranks": {"final": "params=0.9"}}},
        "final params=0.9 is above convert's params=0.5",
    ),
    ({"convert": {}, "train": {"epochs": 3, "ranks": {"final": 4, "end": 5}}}, "epoch 5 never"),
    ({"convert": {}, "train": {"batch_size": 10, "accumulate": 4}}, "10 can't be split into 4"),
    ({"pretrain": {"batch_size": 2, "accumulate": 4}}, "into 4 equal parts (accumulate × proc"),
    ({"pretrain": {"batch_size": 1}}, "a batch of 1 image is too small for batch norm"),
    ({"convert": {}, "train": {"batch_size": 4, "accumulate": 4}}, "too small for batch norm"),
    ({"pretrain": {"ranks": {"final": 4}}}, "no factored layer"),
    ({"bench": {"runtimes": ["torch-cudagraph"], "devices": ["cpu"]}}, "runs on cuda only"),
    ({"convert": {}, "train": {"teach": False, "rule": SSA | {"lookahead": 1}}}, "lookahead"),
]


def refused_in_one_line(recipe: Recipe, folder, message: str) -> None:
    """Refused before the folder is touched, and by a dry run in the same words."""
    with pytest.raises(StiefelError) as caught:
        running.run(recipe, folder, Console())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not folder.exists()
    with pytest.raises(StiefelError, match=re.escape(str(caught.value))):
        running.dry_run(recipe)


@pytest.mark.parametrize(("sections", "message"), MISTAKES)
def test_a_mistake_in_a_later_section_is_refused_before_the_folder_is_touched(
    sections, message, tmp_path
):
    recipe = Recipe.model_validate(RECIPE | sections)
    refused_in_one_line(recipe, tmp_path / "run", message)


def test_a_runtime_that_is_not_installed_is_refused_before_the_folder_is_touched(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(runtimes, "try_provider", lambda provider: "does not load")
    monkeypatch.setattr(runtimes, "compiler", lambda: None)
    for name, message in (
        ("onnxruntime", "ONNX Runtime's CPUExecutionProvider does not work here"),
        ("torch-compile", "needs a C++ compiler"),
    ):
        bench = {"runtimes": ["torch", name], "devices": ["cpu"]}
        recipe = Recipe.model_validate(RECIPE | {"bench": bench})
        refused_in_one_line(recipe, tmp_path / "run", message)


def test_a_factored_model_is_refused_by_a_recipe_that_begins_with_a_dense_one(tmp_path):
    path = tmp_path / "small.safetensors"
    model = load("zoo:digits")
    save_factored(convert(model, plan(model, 0.25)), path)
    recipe = Recipe.model_validate(RECIPE | {"model": {"checkpoint": str(path)}, "train": {}})
    with pytest.raises(StiefelError, match="factored already"):
        running.run(recipe, tmp_path / "run", Console())


OWN_RANKS = (
    {},
    {"features.3": "keep"},
    {"features.3": {"rank": 9}},
    {"classifier.1": {"rank": 0.5}},
)


@pytest.mark.parametrize("cost", ["params", "macs"])
@pytest.mark.parametrize("layers", OWN_RANKS)
def test_a_budget_is_refused_where_and_as_planning_refuses_it(cost, layers):
    torch.manual_seed(0)
    model = load("zoo:digits")

    def checked(rank):
        check(Recipe.model_validate(RECIPE | {"convert": {"rank": rank, "layers": layers}}), model)

    with pytest.raises(StiefelError, match="out of reach") as planned:
        plan(model, f"{cost}=0.001", layers=layers, example=example_of(model))
    with pytest.raises(StiefelError) as refused:
        checked(f"{cost}=0.001")
    assert str(refused.value) == str(planned.value)
    least = str(planned.value).split(f"{cost}=")[-1].removesuffix(" is left")
    checked(f"{cost}={least}")
