"""Damaged checkpoints say what is wrong with them, and a failed write leaves what was there."""

import errno
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn

from converter import checkpoints
from converter.checkpoints import (
    load_any,
    load_factored,
    save_dense,
    save_factored,
)
from converter.errors import StiefelError
from tests.converter.checkpoint import refusal


def rewritten(path: Path, change) -> Path:
    """A copy of a checkpoint whose tensors and metadata `change(tensors, metadata)` has altered."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors, metadata)
    other = path.with_name("other.safetensors")
    safetensors.torch.save_file(tensors, other, metadata)
    return other


def test_load_any_says_what_it_cannot_load(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"x")
    assert "ONNX" in refusal(tmp_path / "net.onnx")
    (tmp_path / "small.safetensors").write_bytes(b"")
    assert "is empty" in refusal(tmp_path / "small.safetensors")
    assert "did you mean small.safetensors" in refusal(tmp_path / "smal.safetensors")
    with pytest.raises(StiefelError, match="did you mean zoo"):
        load_any("zo:digits")


# Damage


def test_a_newer_format_is_refused(saved):
    newer = rewritten(saved, lambda _, metadata: metadata.update(version="2"))
    assert "newer stiefel (format 2" in refusal(newer)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("version", "one", "version 'one'"),
        ("layers", "{", "'layers' is no JSON"),
        ("layers", '{"features.3": {"kind": "FactoredConv2d"}}', "features.3"),
        ("model", '{"name": 3}', "model"),
        ("history", "{}", "history"),
        ("aliases", '{"a": "b"}', "'a' is tied to 'b'"),
    ],
)
def test_a_damaged_header_is_named(saved, key, text, words):
    path = rewritten(saved, lambda _, metadata: metadata.update({key: text}))
    assert words in refusal(path)


def test_layers_that_do_not_fit_their_model_are_named(saved):
    def change(name: str, **record):
        def apply(_, metadata):
            layers = json.loads(metadata["layers"])
            layers[name] = layers.get(name, layers["features.3"]) | record
            metadata["layers"] = json.dumps(layers)

        return refusal(rewritten(saved, apply))

    assert "'features.99' that its model hasn't" in change("features.99")
    assert "a BatchNorm2d in the model" in change("features.4")
    assert "is a FactoredLinear there, a Conv2d" in change("features.3", kind="FactoredLinear")
    assert "weight (64, 32, 5, 5) there" in change("features.3", shape=[64, 32, 5, 5])
    assert "'features.3.U' is" in change("features.3", rank=5)
    assert "'features.3.U' is" in change("features.3", scheme="channel")
    assert "scheme" in change("features.3", scheme="diagonal")


def test_missing_and_strange_tensors_are_named(saved):
    def lacks(key):
        return refusal(rewritten(saved, lambda tensors, _: tensors.pop(key)))

    assert "'features.3.U' is absent" in lacks("features.3.U")
    assert "lacks features.4.weight" in lacks("features.4.weight")
    strange = rewritten(saved, lambda tensors, _: tensors.update(x=torch.zeros(1)))
    assert "unknown tensor x" in refusal(strange)
    other = rewritten(saved, lambda t, _: t.update({"features.4.weight": torch.zeros(3)}))
    assert "features.4.weight is (3,) there, (64,) in the model" in refusal(other)


@given(part=st.floats(0, 0.999))
def test_a_file_cut_anywhere_is_one_clear_line(tmp_path_factory, saved, part):
    path = tmp_path_factory.mktemp("cut") / "s.safetensors"
    path.write_bytes(saved.read_bytes()[: int(saved.stat().st_size * part)])
    assert "fetch it again" in refusal(path)


def test_a_stranger_s_factory_is_not_run(saved):
    spec = json.dumps({"name": "os:system", "args": {"command": "true"}, "num_classes": 2})
    path = rewritten(saved, lambda _, metadata: metadata.update(model=spec))
    with pytest.raises(StiefelError, match="isn't evidently a model"):
        load_any(path)


# Failures while writing


def full_disk(tensors, path, metadata) -> None:
    Path(path).write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def failing_serialiser(tensors, path, metadata) -> None:
    Path(path).write_bytes(b"half")
    raise SafetensorError("I/O error:\n No space left on device (os error 28)")


def interrupted(tensors, path, metadata) -> None:
    Path(path).write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (full_disk, StiefelError),
        (failing_serialiser, StiefelError),
        (interrupted, KeyboardInterrupt),
    ],
)
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(
    tmp_path, monkeypatch, saved, failure, error
):
    model = load_factored(saved)
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(checkpoints.safetensors.torch, "save_file", failure)
    with pytest.raises(error) as caught:
        save_factored(model, path)
    if error is StiefelError:
        assert "No space left" in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path, saved):
    with pytest.raises(StiefelError, match="does not exist"):
        save_factored(load_factored(saved), tmp_path / "no" / "s.safetensors")


def test_what_has_no_values_cannot_be_saved(tmp_path):
    with pytest.raises(StiefelError, match="weight"):
        save_dense(nn.Linear(2, 2, device="meta"), tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())
