"""Files of every usual kind are read, and what is none is told; no code runs."""

import errno
import json
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from converter.errors import StiefelError
from converter.state_dicts import read_state
from tests.converter.weights import Tied, refusal, same, weights


def test_safetensors_load_with_names_that_were_left_out_for_sharing(tmp_path):
    model = Tied()
    safetensors.torch.save_model(model, str(tmp_path / "c.safetensors"))
    assert same(read_state(tmp_path / "c.safetensors"), model.state_dict())


@pytest.mark.parametrize("named", ["c.safetensors.index.json", "c.safetensors", "first"])
def test_shards_load_by_their_index_or_the_whole_files_name_or_any_shard(tmp_path, named):
    state = weights()
    parts = {"c-00001-of-00002.safetensors": list(state)[:2]}
    parts["c-00002-of-00002.safetensors"] = list(state)[2:]
    for file, keys in parts.items():
        safetensors.torch.save_file({key: state[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "c.safetensors.index.json").write_text(json.dumps(index))
    path = tmp_path / (next(iter(parts)) if named == "first" else named)
    assert same(read_state(path), state)


def test_an_incomplete_set_of_shards_names_the_missing_file(tmp_path):
    index = tmp_path / "c.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "c-1.safetensors"}}))
    assert "c-1.safetensors" in refusal(index)
    safetensors.torch.save_file({"b": torch.zeros(1)}, tmp_path / "c-1.safetensors")
    assert "promises a" in refusal(index)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "outside its folder" in refusal(index)
    index.write_text("{}")
    assert "no index" in refusal(index)


def test_a_whole_pickled_model_is_refused_with_the_safe_way(tmp_path):
    torch.save(Tied(), tmp_path / "c.pt")
    text = refusal(tmp_path / "c.pt")
    assert "Tied" in text
    assert "model.state_dict()" in text


def test_a_pickle_that_would_run_code_does_not_run_it(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "bang"), "w"))

    torch.save({"state_dict": weights(), "x": Bomb()}, tmp_path / "c.pt")
    assert "could run any code" in refusal(tmp_path / "c.pt")
    assert not (tmp_path / "bang").exists()


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "c.pt")
    assert "TorchScript" in refusal(tmp_path / "c.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_cut_anywhere_is_one_clear_line(tmp_path, suffix):
    path = tmp_path / f"c.{suffix}"
    save = torch.save if suffix == "pt" else safetensors.torch.save_file
    save(weights(), path)
    whole = path.read_bytes()
    for part in (0.0, 0.001, 0.02, 0.3, 0.7, 0.99):
        path.write_bytes(whole[: int(len(whole) * part)])
        assert "fetch it again" in refusal(path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes_never_make_a_traceback(tmp_path_factory, suffix, content):
    path = tmp_path_factory.mktemp("bytes") / f"c.{suffix}"
    path.write_bytes(content)
    with pytest.raises(StiefelError):
        read_state(path)


@pytest.mark.parametrize("content", [b"hello\n", bytes(range(256)) * 12])
def test_what_torch_says_of_a_file_that_is_none_of_its_own_is_left_out(tmp_path, content):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    assert refusal(path) == f"{path} is truncated or no checkpoint; fetch it again"


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    torch.save(weights(), tmp_path / "c.pt")
    monkeypatch.setattr(torch, "load", denied)
    assert refusal(tmp_path / "c.pt") == f"cannot read {tmp_path / 'c.pt'}: Permission denied"


def test_what_is_no_checkpoint_says_what_it_is(tmp_path):
    pointer = tmp_path / "c.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(pointer)
    assert "is a folder" in refusal(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list" in refusal(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    assert "holds no weights" in refusal(tmp_path / "none.pt")


def test_a_missing_file_names_the_nearest(tmp_path):
    torch.save(weights(), tmp_path / "resnet32.pth")
    assert "did you mean resnet32.pth" in refusal(tmp_path / "resnet23.pth")
    assert "there is no file" in refusal(tmp_path / "nowhere" / "x.pt")
