"""Every torchvision classifier family, at half its parameters: runs, learns, is saved and reread.

The fastest of them run by default; `-m slow` runs them all.
"""

import pytest
import torch

from converter.calibration import Calibration
from converter.checkpoints import load_factored, save_factored
from converter.convert import convert, plan
from converter.factors import factored_layers
from converter.models import load

# The smallest of each family, at an image side that it takes and a processor bears.
LIGHT = {"squeezenet1_1": 64, "shufflenet_v2_x0_5": 64, "mobilenet_v3_small": 64, "mnasnet0_5": 64}
HEAVY = {
    "alexnet": 64,
    "vgg11_bn": 32,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "densenet121": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_large": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "vit_b_32": 224,
    "swin_t": 64,
    "swin_v2_t": 64,
    "maxvit_t": 224,
    "googlenet": 64,
    "inception_v3": 96,
}


@pytest.mark.parametrize(
    ("name", "side"),
    [*LIGHT.items(), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in HEAVY.items())],
)
def test_a_family_converts_learns_and_comes_back(name, side, tmp_path):
    dense = _stirred(load(f"torchvision:{name}", args={"num_classes": 10}))
    made = plan(dense, "params=0.5")
    small = convert(dense, made)
    whole, kept = (sum(p.numel() for p in model.parameters()) for model in (dense, small))
    assert 0.49 * whole <= kept == made.factored_parameters <= 0.5 * whole
    assert type(small) is type(dense)
    assert not any(entry.rank is None and not entry.reason for entry in made.layers)

    images = torch.randn(2, 3, side, side)
    unreached = {
        name.replace(".in_proj.", ".in_proj_") if "attention" in name else name
        for name in _without_gradient(small, images)
    }
    assert unreached <= _without_gradient(dense, images)
    assert all(layer.S.grad.any() for layer in factored_layers(small).values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in small.parameters())

    save_factored(small, tmp_path / "small.safetensors")
    again = load_factored(tmp_path / "small.safetensors")
    assert type(again) is type(dense)
    with torch.no_grad():
        expected = small(images)
        assert expected.shape == (2, 10)
        assert torch.equal(again(images), expected)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("shufflenet_v2_x0_5", 64),  # splits and concatenations
        pytest.param("densenet121", 64, marks=pytest.mark.slow),
        pytest.param("googlenet", 64, marks=pytest.mark.slow),
        pytest.param("swin_t", 64, marks=pytest.mark.slow),  # weights read, not called
    ],
)
def test_calibration_brings_a_network_closer_to_the_dense_one(name, side):
    dense = _stirred(load(f"torchvision:{name}", args={"num_classes": 10})).eval()
    images = torch.randn(6, 3, side, side)
    settings = Calibration(refine_steps=0, ridge=1e-2)
    gaps = {}
    for calibration in (None, images):
        made = plan(dense, 0.2, calibration=calibration, settings=settings)
        small = convert(dense, made, calibration=calibration, settings=settings)
        with torch.no_grad():
            gaps[calibration is None] = float((small(images) - dense(images)).square().mean())
    assert gaps[False] < 0.9 * gaps[True]


def _without_gradient(model: torch.nn.Module, images: torch.Tensor) -> set[str]:
    """Names of parameters that a backward pass does not reach."""
    model.zero_grad()
    model(images).square().sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


def _stirred(model: torch.nn.Module) -> torch.nn.Module:
    """The model with no weight at zero, where gradients would stop (ViT's head starts there)."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return model
