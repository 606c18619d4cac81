"""Inference on a GPU: `pytest -m gpu`."""

import pytest
import torch
from torch import nn

from converter.convert import convert, plan
from converter.models import load
from export.bench import BenchSettings, bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA"),
]


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = load("zoo:resnet20").eval()
    return {"dense": dense, "small": convert(dense, plan(dense, "params=0.5"))}


def test_models_are_timed_in_torch_and_as_graphs(models):
    quick = BenchSettings(
        runtimes=("torch", "torch-cudagraph"),
        devices=("cuda",),
        precisions=("fp32", "fp16", "bf16"),
        batches=(1, 32),
        rounds=3,
        seconds=0.1,
    )
    report = bench(models, quick)
    assert len(report.rows) == 2 * 2 * 3 * 2
    assert len(report.ratios) == 2 * 3 * 2
    assert all(row.latency_ms_p50 > 0 and row.device.startswith("cuda") for row in report.rows)


def test_a_budget_of_latency_is_measured_on_the_gpu():
    torch.manual_seed(0)
    dense = load("zoo:vgg13").eval()
    example = torch.randn(256, 3, 32, 32)
    planned = plan(dense, "latency=0.9", example=example, device="cuda")
    assert planned.factored_latency_ms < planned.dense_latency_ms
