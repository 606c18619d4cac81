"""Refinement brings features closer, undoes what leads astray, and finds its units."""

import copy

import pytest
import torch
from torch import nn

from converter.calibration import Calibration
from converter.convert import convert, plan
from converter.factors import factored_layers
from converter.layers import prepared
from converter.refinement import find_units, refine
from converter.zoo import ZOO
from tests.converter.calibrated import QUICK, residual_net, settled, shrunk


def test_refinement_brings_features_closer_and_leaves_proper_factors(images):
    net = settled(residual_net())
    small = shrunk(net, images, Calibration(refine_steps=0))
    for p in small.parameters():
        p.requires_grad_(False)
    ready = prepared(net)
    before, after = refine(ready, small, images, Calibration(refine_steps=90, refine_batch=16))
    assert after < 0.96 * before
    for layer in factored_layers(small).values():
        eye = torch.eye(layer.rank)
        torch.testing.assert_close(layer.U.mT @ layer.U, eye, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.V.mT @ layer.V, eye, rtol=0, atol=1e-5)
        assert (layer.S.diff() <= 0).all()
        assert (layer.S >= 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in small.parameters())


def test_refinement_that_leads_astray_is_undone(images):
    net = settled(residual_net())
    small = shrunk(net, images, Calibration(refine_steps=0))
    state = copy.deepcopy(small.state_dict())
    before, after = refine(prepared(net), small, images, Calibration(refine_lr=50, refine_steps=4))
    assert after == before
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())


def test_units_are_the_residual_blocks_and_single_layers_of_plain_chains(images):
    net = ZOO["resnet56"]().eval()
    small = convert(net, plan(net, 0.5))
    assert find_units(small)[:3] == ["conv1", "layer1.0", "layer1.1"]
    assert len(find_units(small)) == 1 + 27 + 1
    chain = nn.Sequential(*[nn.Linear(8, 8) for _ in range(9)])
    assert find_units(convert(chain, plan(chain, 2))) == [str(i) for i in range(9)]


class Raw(nn.Module):
    """Reads its layers' weights and never calls them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x):
        h = nn.functional.linear(x.flatten(1), self.a.weight, self.a.bias)
        return nn.functional.linear(h.relu(), self.b.weight, self.b.bias)


@pytest.mark.parametrize("rank", [2, "params=0.5"])
def test_where_no_unit_is_called_there_is_nothing_to_refine(rank):
    model, images = Raw(), torch.randn(16, 3, 2, 2)
    made = plan(model, rank, calibration=images)
    small = convert(model, made, calibration=images, settings=QUICK)
    assert factored_layers(small)
    assert refine(model, small, images, QUICK) == (0.0, 0.0)
