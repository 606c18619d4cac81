"""Layers that the output minds are spared."""

import pytest
import torch
from torch import nn

from converter.calibration import Calibration
from converter.layers import find_layers
from converter.sensitivity import sensitivities
from tests.converter.calibrated import CPU, OFF


def test_budgets_spare_the_layers_that_the_output_minds(images):
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 20), nn.Linear(20, 20), nn.Linear(20, 5))
    with torch.no_grad():
        net[3].weight.mul_(0.01)
    layers = find_layers(net.eval())
    found = sensitivities(net, images, layers, Calibration(sensitivity=1.0), CPU)
    twice = sensitivities(net, images.repeat(2, 1, 1, 1), layers, Calibration(), CPU)
    assert set(found) == {"1", "2", "3"}
    assert torch.tensor([*found.values()]).log().sum() == pytest.approx(0, abs=1e-4)
    assert twice["2"] == pytest.approx(found["2"] ** 0.5, rel=0.3)
    assert sensitivities(net, images, layers, OFF, CPU) == {}


def test_sequences_are_minded_as_maps_one_pixel_high():
    torch.manual_seed(0)
    short = nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3), nn.Flatten())
    short.append(nn.Linear(24, 5))
    flat = nn.Sequential(nn.Conv2d(3, 6, (1, 3)), nn.ReLU(), nn.Conv2d(6, 4, (1, 3)), nn.Flatten())
    flat.append(nn.Linear(24, 5))
    for one, other in zip(short.parameters(), flat.parameters(), strict=True):
        other.data = one.data.reshape(other.shape)
    x, settings = torch.randn(16, 3, 10), Calibration(sensitivity=1.0)
    found = [
        sensitivities(net.eval(), images, find_layers(net), settings, CPU)
        for net, images in ((short, x), (flat, x.unsqueeze(2)))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
