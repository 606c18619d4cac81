"""The limits that figures are held against are the device's, on a busy machine too."""

import pytest
import torch

from export import ceilings
from export.ceilings import ceiling

CPU = torch.device("cpu")


def test_the_best_product_counts_whatever_its_size_and_library(monkeypatch):
    """The fourth product is the fastest; the copy takes a millisecond."""
    times = iter([1.0, 1.0, 1.0, 1e-3, 1.0, 1e-3])
    monkeypatch.setattr(ceilings, "_best", lambda call, device, seconds: next(times))
    found = ceiling(CPU, "fp32")
    assert found.gflops_per_s == pytest.approx(2e-9 * 1024**3 / 1e-3)
    assert found.gbytes_per_s == pytest.approx(2e-9 * 4 * 2**24 / 1e-3)


def test_half_precision_is_held_against_no_less_than_single(monkeypatch):
    """ONNX Runtime computes fp16 in fp32 on a CPU, where torch takes a thousand times as long."""
    taken = []

    def best(call, device, seconds):
        out = call()
        taken.append(getattr(out, "dtype", None))
        return 1.0 if taken[-1] == torch.float16 else 1e-3

    monkeypatch.setattr(ceilings, "_best", best)
    assert ceiling(CPU, "fp16").gflops_per_s == pytest.approx(2e-9 * 1024**3 / 1e-3)
    assert torch.float16 in taken
    assert torch.float32 in taken
