"""Every torchvision family, dense and factored, through the ONNX exporter and back."""

import pytest
import torch

from converter.convert import convert, plan
from converter.models import load
from export import parity
from export.onnx import export_onnx

# The smallest of each family, at an image size that it takes and a processor bears.
LIGHT = {"squeezenet1_1": 64, "shufflenet_v2_x0_5": 64}
HEAVY = {
    "alexnet": 64,
    "vgg11_bn": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "densenet121": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "vit_b_16": 224,
    "swin_t": 64,
    "swin_v2_t": 64,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "googlenet": 64,
    "inception_v3": 96,
}


CASES = [
    pytest.param(name, size, dense, marks=() if name in LIGHT and not dense else pytest.mark.slow)
    for name, size in (LIGHT | HEAVY).items()
    for dense in (False, True)
]


@pytest.mark.parametrize(("name", "size", "dense"), CASES)
def test_a_family_exports_and_agrees_at_two_batch_sizes(tmp_path, stir, name, size, dense):
    model = stir(load(f"torchvision:{name}", args={"num_classes": 10}))
    if not dense:
        model = convert(model, plan(model, "params=0.5"))
    path, example = tmp_path / "net.onnx", torch.zeros(1, 3, size, size)
    result = export_onnx(model, path, example=example)
    inputs = [parity.random_input(example, batch, seed=batch) for batch in (2, 5)]
    assert parity.outputs_differ(model, path, inputs).relative < parity.TOLERANCES["fp32"]
    assert result.dynamic[0] == "batch"
    assert bool(result.ranks) is not dense
