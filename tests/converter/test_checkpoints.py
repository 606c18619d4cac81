"""Our own checkpoints: what is saved comes back exactly."""

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from converter import header
from converter.checkpoints import (
    load_any,
    load_factored,
    read_metadata,
    save_dense,
    save_factored,
)
from converter.convert import convert, plan
from converter.errors import StiefelError
from converter.factors import factored_layers
from converter.models import InputSpec, load, spec_of
from tests.converter.checkpoint import refusal

NETS = """
import torch
from torch import nn
from torch.nn.utils import parametrizations

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(16, 2, batch_first=True)
        self.rest = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = x.flatten(2).mT
        x = self.mix(x, x, x)[0]
        return self.head(self.rest(x, x, x)[0].mean(1))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.twice = nn.Linear(16, 16)
        self.again = self.twice
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.second(self.first(x.mean((2, 3))))
        return self.head(self.again(self.twice(x)))

class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, (3, 1), (2, 1), (1, 0), groups=2, padding_mode="reflect")
        self.norm = parametrizations.weight_norm(nn.Linear(16, 8))
        self.head = parametrizations.weight_norm(nn.Linear(8, 3))
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        return self.head(self.norm(torch.relu(self.conv(x)).mean((2, 3)))) * self.scale
"""


INPUT = InputSpec.plain((16, 6, 6))


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("nets") / "nets.py"
    file.write_text(NETS)
    return file


def factored(name: str, rank=0.5, layers=None) -> nn.Module:
    model = load(name, input=INPUT if ".py" in name else None)
    return convert(model, plan(model, rank, layers=layers or {}))


def example(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    dtype = next(model.parameters()).dtype
    return torch.randn(2, *spec_of(model).input.shape, generator=generator).to(dtype)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {key: v.dtype for key, v in ours.items()} == {key: v.dtype for key, v in theirs.items()}
    kinds = {name: type(module).__name__ for name, module in first.named_modules()}
    assert {name: type(module).__name__ for name, module in second.named_modules()} == kinds
    with torch.no_grad():
        x = example(first)
        assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize("name", ["zoo:digits", "zoo:resnet20", "Attention", "Tied", "Grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_factored_model_comes_back_exactly(tmp_path, nets, name, dtype):
    model = factored(name if ":" in name else f"{nets}:{name}").to(dtype)
    assert factored_layers(model)
    save_factored(model, tmp_path / "s.safetensors")
    again = load_factored(tmp_path / "s.safetensors")
    assert_same(model, again)
    assert spec_of(again) == spec_of(model)
    assert list(factored_layers(again)) == list(factored_layers(model))
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())


def test_what_is_frozen_comes_back_frozen(tmp_path):
    dense = load("zoo:mlp")
    frozen = next(module for module in dense.modules() if isinstance(module, nn.Linear))
    frozen.requires_grad_(False)
    model = convert(dense, plan(dense, 4))
    save_factored(model, tmp_path / "s.safetensors")
    # The file holds values; what is frozen is the architecture's to say.
    again = load_factored(tmp_path / "s.safetensors", model=copy.deepcopy(dense))
    asked, found = ({n: p.requires_grad for n, p in m.named_parameters()} for m in (model, again))
    assert asked == found
    assert not all(asked.values())


@given(ranks=st.lists(st.integers(0, 16), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_any_choice_of_ranks_comes_back(tmp_path_factory, ranks, seed):
    torch.manual_seed(seed)
    path = tmp_path_factory.mktemp("ranks") / "s.safetensors"
    names = ["features.3", "features.7", "classifier.1", "classifier.4"]
    choice = {n: {"rank": r} if 0 < r <= 10 else "keep" for n, r in zip(names, ranks, strict=True)}
    model = factored("zoo:digits", 4, choice)
    save_factored(model, path)
    assert_same(model, load_factored(path))


def test_a_dense_model_comes_back_exactly_and_is_not_called_factored(tmp_path, nets):
    for name in ("Attention", "Tied", "Grouped"):
        model = load(f"{nets}:{name}", input=INPUT)
        save_dense(model, tmp_path / "d.safetensors")
        assert_same(model, load_any(tmp_path / "d.safetensors"))


def test_a_dense_file_may_not_hold_factored_layers(tmp_path):
    with pytest.raises(StiefelError, match="save_factored"):
        save_dense(factored("zoo:digits"), tmp_path / "d.safetensors")
    assert not list(tmp_path.iterdir())


def test_ties_are_stored_once_and_tied_again(tmp_path, nets):
    for model in (load(f"{nets}:Tied", input=INPUT), factored(f"{nets}:Tied")):
        save_factored(model, tmp_path / "s.safetensors")
        again = load_factored(tmp_path / "s.safetensors")
        assert again.twice is again.again
        for name, parameter in model.first.named_parameters(recurse=False):
            tied = parameter is getattr(model.second, name)
            assert (getattr(again.first, name) is getattr(again.second, name)) == tied
        count = len(safetensors.torch.load_file(tmp_path / "s.safetensors"))
        assert count == len(list(model.parameters()))
        assert len(list(again.parameters())) == len(list(model.parameters()))


def test_tensors_that_share_memory_without_being_tied_are_stored_apart(tmp_path):
    model = load("zoo:digits")
    block = torch.randn(2, 64)
    model.features[4].weight = nn.Parameter(block[0])
    model.features[4].bias = nn.Parameter(block[1])
    save_dense(model, tmp_path / "d.safetensors")
    assert_same(model, load_any(tmp_path / "d.safetensors"))


def test_a_model_trained_to_other_ranks_comes_back(tmp_path):
    model = factored("zoo:digits")
    layer = next(iter(factored_layers(model).values()))
    layer.truncate_(torch.tensor([3, 1]))
    save_factored(model, tmp_path / "s.safetensors")
    assert_same(model, load_factored(tmp_path / "s.safetensors"))


def test_a_conversion_of_a_loaded_model_comes_back(tmp_path, saved):
    model = load_factored(saved)
    smaller = convert(model, plan(model, 4))
    save_factored(smaller, tmp_path / "s.safetensors")
    assert_same(smaller, load_factored(tmp_path / "s.safetensors"))


def test_the_same_model_makes_the_same_file(tmp_path, saved):
    model = load_factored(saved)
    for _ in range(5):
        save_factored(model, tmp_path / "s.safetensors")
        assert (tmp_path / "s.safetensors").read_bytes() == saved.read_bytes()


def test_history_and_plan_travel_with_the_model(tmp_path, saved):
    model = copy.deepcopy(load_factored(saved))
    save_factored(model, tmp_path / "s.safetensors", history={"step": "train", "epochs": 3})
    again = load_factored(tmp_path / "s.safetensors")
    assert again.stiefel_history == [{"step": "convert"}, {"step": "train", "epochs": 3}]
    assert again.stiefel_plan == model.stiefel_plan


def test_the_header_tells_what_the_format_promises(saved):
    with safetensors.safe_open(saved, "pt") as file:
        texts = file.metadata()
    assert texts["format"] == "stiefel"
    assert texts["version"] == "1"
    assert json.loads(texts["model"])["name"] == "zoo:digits"
    layers = json.loads(texts["layers"])
    tensors = safetensors.torch.load_file(saved)
    for name, record in layers.items():
        assert tensors[f"{name}.S"].shape == (record["rank"],)
        assert tensors[f"{name}.U"].shape[-1] == record["rank"]
    assert layers["features.3"]["scheme"] == "spatial"
    assert layers["features.3"]["shape"] == [64, 32, 3, 3]
    assert read_metadata(saved)["layers"] == {
        name: record | {"groups": 1} for name, record in layers.items()
    }


def test_a_model_made_by_hand_comes_back_into_an_architecture_given_by_hand(tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4))
    small = convert(dense, plan(dense, 4))
    save_factored(small, tmp_path / "s.safetensors")
    again = load_factored(tmp_path / "s.safetensors", model=dense)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(again(x), small(x))
    assert isinstance(dense[1], nn.Linear), "the architecture given is copied"
    assert "made by hand" in refusal(tmp_path / "s.safetensors")


def test_a_moved_factory_may_be_named_again(tmp_path, nets):
    file = tmp_path / "moving.py"
    file.write_text(NETS)
    model = factored(f"{file}:Tied")
    save_factored(model, tmp_path / "s.safetensors")
    file.rename(tmp_path / "moved.py")
    with pytest.raises(StiefelError, match=r"no file .*moving\.py"):
        load_any(tmp_path / "s.safetensors")
    again = load_any(tmp_path / "s.safetensors", model=f"{tmp_path / 'moved.py'}:Tied")
    x = example(model)
    assert torch.equal(again(x), model(x))


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    load_factored(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_load_any_takes_names_our_files_and_others_files(tmp_path, saved):
    assert spec_of(load_any("zoo:digits", args={"num_classes": 3})).num_classes == 3
    assert factored_layers(load_any(saved))
    torch.save(load("zoo:digits").state_dict(), tmp_path / "wild.pth")
    assert spec_of(load_any(tmp_path / "wild.pth", model="zoo:digits")).name == "zoo:digits"
    assert "name the model" in refusal(tmp_path / "wild.pth")


def test_putting_a_header_in_order_keeps_every_tensor(tmp_path, saved):
    path = tmp_path / "s.safetensors"
    tensors = {"ä": torch.arange(5), "b": torch.zeros(0, 3), "c": torch.tensor(2.5)}
    safetensors.torch.save_file(tensors, path, {"z": "ü\n", "a": '"'})
    header.sort_metadata(path)
    again = safetensors.torch.load_file(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"z": "ü\n", "a": '"'}


def test_parametrized_layers_are_folded_as_conversion_folds_them(tmp_path):
    dense = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(8, 8)))
    dense.append(parametrizations.weight_norm(nn.Linear(8, 2)))
    small = convert(dense, plan(dense, 2, layers={"2": "keep"}))
    save_factored(small, tmp_path / "s.safetensors")
    again = load_factored(tmp_path / "s.safetensors", model=dense)
    x = torch.randn(3, 8)
    assert torch.equal(again(x), small(x))
