"""Images that tests of calibration share."""

import pytest
import torch


@pytest.fixture
def images() -> torch.Tensor:
    """(70, 3, 6, 6), from a seed of their own."""
    return torch.randn(70, 3, 6, 6, generator=torch.Generator().manual_seed(1))
