"""The compact .safetensors file reads back exactly, in plain torch."""

import errno
import json
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import export.safetensors as module
from converter.convert import convert, plan
from converter.errors import StiefelError
from converter.models import load
from converter.specs import InputChange
from export import parity
from export.compact import compact
from export.safetensors import (
    SafetensorsSettings,
    build,
    export_safetensors,
    is_compact,
    read_metadata,
)

README = Path(__file__).parents[2] / "README.md"


def snippet() -> str:
    """The code block of the module's docstring."""
    block = module.__doc__.partition("::\n\n")[2].partition("\n\n")[0]
    return textwrap.dedent(block)


@pytest.fixture(scope="module")
def written(tmp_path_factory, factor):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("compact") / "small.safetensors"
    model = factor(load("torchvision:resnet18"), 8)
    return model, path, export_safetensors(model, path, accuracy=0.5)


def test_the_documented_snippet_rebuilds_the_model_without_stiefel(written):
    factored, path, _ = written
    code = snippet()
    assert len(code.splitlines()) == 5
    assert "stiefel" not in code
    names = {"json": json, "torch": torch, "torchvision": torchvision, "safetensors": safetensors}
    exec(code, scope := names | {"path": path})
    model, x = scope["model"].eval(), torch.randn(2, 3, 64, 64)
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch", "torchvision"}
    with torch.no_grad():
        assert torch.equal(model(x), compact(factored)(x))
        assert torch.equal(model(x), build(path)(x))


def test_the_readme_shows_the_same_snippet():
    assert snippet() in README.read_text(encoding="utf-8")


def test_every_tensor_reads_back_and_the_header_tells_its_story(written):
    model, path, result = written
    stored, state = safetensors.torch.load_file(path), compact(model).state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)
    facts = read_metadata(path)
    assert json.loads(facts["ranks"]) == result.ranks
    assert json.loads(facts["model"])["name"] == "torchvision:resnet18"
    assert float(facts["accuracy"]) == 0.5
    assert result.file_size_bytes == path.stat().st_size
    assert result.compared == "outputs"
    assert result.max_rel_error < 1e-5
    assert is_compact(path)


class Reading(nn.Module):
    """Attention, a layer used twice, and a weight that is read: all kinds of parts there are."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.read, self.twice, self.conv = nn.Linear(32, 32), nn.Linear(32, 32), nn.Conv1d(32, 9, 3)

    def forward(self, x):
        x = self.twice(self.attention(x, x, x, need_weights=False)[0])
        x = nn.functional.linear(self.twice(x), self.read.weight, self.read.bias)
        return self.conv(x.mT)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 0.0), ("fp16", 5e-3), ("bf16", 5e-2)]
)
def test_an_architecture_of_ones_own_is_rebuilt_in_any_precision(
    tmp_path, factor, precision, tolerance
):
    path, model = tmp_path / "own.safetensors", factor(Reading())
    result = export_safetensors(model, path, settings=SafetensorsSettings(precision=precision))
    assert result.compared == "tensors"
    again, x = build(path, model=Reading()), torch.randn(2, 5, 32)
    assert next(again.parameters()).dtype == module.DTYPES[precision]
    a, b = parity.reference_outputs(compact(model), x)[0], again.float()(x).numpy()
    assert parity.difference(a, b).relative <= tolerance
    with pytest.raises(StiefelError, match="doesn't say which model it is"):
        build(path)
    with pytest.raises(StiefelError, match="doesn't fit Linear: "):
        build(path, model=nn.Linear(2, 2))


@pytest.mark.parametrize("kept", ["attention.out_proj", "*"])
def test_attention_whose_output_projection_is_dense_is_rebuilt(tmp_path, kept):
    torch.manual_seed(0)
    dense = Reading()
    model = convert(dense, plan(dense, 0.5, layers={kept: "keep"}))
    path = tmp_path / "own.safetensors"
    export_safetensors(model, path)
    again, x = build(path, model=Reading()), torch.randn(2, 5, 32)
    torch.testing.assert_close(again(x), compact(model)(x))


def _parametrised() -> nn.Module:
    return nn.Sequential(*(weight_norm(nn.Linear(8, 8)) for _ in range(2)), nn.Linear(8, 3))


def test_parametrised_layers_that_stay_dense_are_rebuilt_as_plain_ones(tmp_path):
    torch.manual_seed(0)
    dense = _parametrised()
    model = convert(dense, plan(dense, 2, layers={"1": "keep"}))
    path = tmp_path / "own.safetensors"
    export_safetensors(model, path)
    again, x = build(path, model=_parametrised()), torch.randn(2, 8)
    torch.testing.assert_close(again(x), compact(model)(x))


def test_a_model_that_asks_for_its_state_s_version_is_rebuilt(tmp_path):
    path = tmp_path / "mnasnet.safetensors"
    dense = load("torchvision:mnasnet0_5", input=InputChange(shape=(3, 32, 32)))
    model = convert(dense, plan(dense, 0.5))
    assert export_safetensors(model, path).compared == "outputs"
    assert build(path)(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_what_the_architecture_cannot_take_names_the_file_that_was_asked_for(tmp_path):
    model = load("zoo:digits")
    model.classifier.append(nn.Linear(10, 10))  # not what zoo:digits builds
    with pytest.raises(StiefelError, match=r"a\.safetensors doesn't fit Convolutional: "):
        export_safetensors(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"old")

    def half(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(StiefelError, match="cannot write .*: No space left on device"):
        export_safetensors(nn.Linear(4, 2), path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    assert path.read_bytes() == b"old"


def test_what_does_not_read_back_is_not_published(tmp_path):
    model = nn.Linear(4, 2)
    nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(StiefelError, match=r"does not read back as written.*weight"):
        export_safetensors(model, tmp_path / "nan.safetensors")
    assert not list(tmp_path.iterdir())


def test_other_files_are_told_apart(tmp_path, written):
    plain, broken = tmp_path / "plain.safetensors", tmp_path / "broken.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, plain)
    broken.write_bytes(written[1].read_bytes()[:1000])
    assert not is_compact(plain)
    assert not is_compact(broken)
    for path, message in ((plain, "is not a compact export"), (broken, "cannot read")):
        with pytest.raises(StiefelError, match=message):
            build(path)
