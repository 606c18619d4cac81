"""What tests share: images to calibrate with, and a checkpoint."""

from pathlib import Path

import pytest
import torch

from converter.checkpoints import save_factored
from converter.convert import convert, plan
from converter.models import load


@pytest.fixture
def images() -> torch.Tensor:
    """(70, 3, 6, 6), from a seed of their own."""
    return torch.randn(70, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The digits network at half rank, in our own format."""
    path = tmp_path_factory.mktemp("saved") / "digits.safetensors"
    model = load("zoo:digits")
    save_factored(convert(model, plan(model, 0.5)), path, history={"step": "convert"})
    return path
