"""Second moments: a few layers at a time, of inputs or outputs, the same in any portions."""

import pytest
import torch
from torch import nn

from converter import moments as gathering
from converter.calibration import Calibration
from converter.convert import plan
from converter.layers import find_layers
from converter.moments import Moments

CPU = torch.device("cpu")
EVERYWHERE = Calibration(positions=10_000, refine_steps=0)


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(128, 6),
        nn.Linear(6, 6),
    ).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(30, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def gathered(net, images, passes=None):
    def count(what: str, done: int, total: int) -> None:
        if passes is not None and done == 0:
            passes.append(what)

    layers = find_layers(net)
    found = Moments(net, images, layers, EVERYWHERE, CPU, count)
    keys = [(layer.name, scheme) for layer in layers for scheme in layer.schemes]
    return {key: found.get(key) for key in keys}


def test_one_pass_is_enough_where_memory_is(net, images):
    passes = []
    assert all(m is not None for m in gathered(net, images, passes).values())
    assert passes == ["calibrate"]


def test_in_little_memory_there_are_more_passes_and_the_same_moments(net, images, monkeypatch):
    whole = gathered(net, images)
    monkeypatch.setattr(gathering, "HELD", 8 * (72**2 + 24**2 + 40**2))
    passes = []
    for key, moment in gathered(net, images, passes).items():
        assert torch.equal(moment.matrix, whole[key].matrix)
    assert len(passes) == 3  # the wide linear layer's moment takes one alone


def test_only_the_latest_pass_is_held(net, images, monkeypatch):
    monkeypatch.setattr(gathering, "HELD", 1)
    found = Moments(net, images, find_layers(net), EVERYWHERE, CPU)
    found.get(("0", "spatial"))
    found.get(("4", None))
    assert {name for name, _ in found._held} == {"4"}


def test_layers_too_wide_for_their_inputs_go_by_their_outputs(net, images, monkeypatch):
    narrow = plan(net, 0.5, calibration=images, settings=EVERYWHERE)
    monkeypatch.setattr(gathering, "WIDEST", 100)
    moment = gathered(net, images)["4", None]
    assert moment.of_outputs
    assert moment.matrix.shape == (6, 6)
    with torch.no_grad():
        y = nn.functional.linear(net[:4](images), net[4].weight).double()
    torch.testing.assert_close(moment.matrix, y.mT @ y / len(y), rtol=1e-5, atol=1e-6)
    wide = plan(net, 0.5, calibration=images, settings=EVERYWHERE)
    assert wide["4"].expected_error == pytest.approx(narrow["4"].expected_error, rel=1e-4)
    monkeypatch.setattr(gathering, "WIDEST", 5)
    assert gathered(net, images)["4", None] is None
