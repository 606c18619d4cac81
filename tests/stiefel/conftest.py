"""A dense checkpoint and what conversion made of it."""

import pytest
import torch

from converter.checkpoints import save_dense
from converter.models import load
from tests.stiefel.command import stiefel


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "dense.safetensors"
    save_dense(load("zoo:digits"), path)
    return path


@pytest.fixture(scope="module")
def small(dense):
    path = dense.with_name("small.safetensors")
    result = stiefel("convert", dense, "--rank", "params=0.5", "-o", path)
    assert result.exit_code == 0, result.output
    return path
