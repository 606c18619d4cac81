"""Multiply-accumulates against formulas worked by hand; shapes as the layers see them."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from converter.convert import convert, plan
from converter.cost import count_macs, count_parameters, inference, layer_calls

X = torch.randn(2, 4, 12, 10)


def conv_macs(layer, output) -> int:
    return layer.weight.numel() * output[-1] * output[-2]


class Query(nn.Module):
    """A learned query, one for all images, goes through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.layer = nn.Parameter(torch.randn(1, 3, 10)), nn.Linear(10, 5)

    def forward(self, x):
        return self.layer(self.query.expand(len(x), -1, -1)) + x.sum()


def test_views_of_parameters_are_no_matter():
    model = Query()
    model.layer.bias.requires_grad_(False)
    assert count_macs(model, X) == 3 * 10 * 5
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    assert asked == {"query": True, "layer.weight": True, "layer.bias": False}


def test_a_tied_parameter_is_counted_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_parameters(model) == 16 + 4 + 4


def test_dense_macs_are_those_of_the_formulas():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(48, 5)
    )
    expected = 8 * 4 * 9 * 5 * 4 + 8 * 2 * 9 * 3 * 2 + 48 * 5
    assert count_macs(model, X) == expected
    assert plan(model, 2, example=X).dense_macs == expected
    assert [entry.dense_macs for entry in plan(model, 2, example=X).layers] == [5760, 864, 240]


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_planned_macs_are_those_the_converted_layer_makes(scheme, kernel, groups, stride):
    model = nn.Sequential(nn.Conv2d(4, 8, kernel, stride, padding=1, groups=groups))
    forced = {"0": {"rank": 2}}
    made = plan(model, 2, scheme=scheme, example=X, layers=forced)
    small = convert(model, made)
    assert made.factored_macs == count_macs(small, X)
    out = model(X).shape
    k1, k2 = (kernel, (1, 1)) if scheme == "channel" else ((kernel[0], 1), (1, kernel[1]))
    # The axis that the second convolution strides keeps its (unpadded) size between the two.
    between = out[2] * (X.shape[3] if k2[1] > 1 else out[3])
    by_hand = (
        2 * groups * (4 // groups) * k1[0] * k1[1] * between
        + 8 * 2 * k2[0] * k2[1] * out[2] * out[3]
    )
    assert made.factored_macs == by_hand
    lower = plan(small, 1, example=X, layers={"0": {"rank": 1}})
    assert (lower.dense_macs, lower.factored_macs) == (by_hand, by_hand // 2)


class Reader(nn.Module):
    """Uses one layer twice, one by its weight only, one not at all."""

    def __init__(self):
        super().__init__()
        self.twice, self.read, self.idle = nn.Linear(10, 10), nn.Linear(10, 6), nn.Linear(3, 3)

    def forward(self, x):
        return F.linear(self.twice(self.twice(x)), self.read.weight[:4])


def test_uses_are_counted_however_the_weight_is_used():
    model = Reader()
    calls = layer_calls(model, X)
    assert {name: len(found) for name, found in calls.items()} == {"twice": 2, "read": 1}
    [read] = calls["read"]
    assert (read.input_shape, read.output_shape) == ((1, 4, 12, 10), (1, 4, 12, 4))
    made = plan(model, 2, example=X, layers={"*": {"rank": 2}})
    positions = 4 * 12
    assert [entry.dense_macs for entry in made.layers] == [2 * positions * 100, positions * 40, 0]
    assert made.dense_macs == count_macs(model, X) == positions * 240
    small = convert(model, made)
    assert made["twice"].factored_macs == 2 * positions * 2 * 20
    assert layer_calls(small, X) == calls


def test_attentions_projections_are_counted():
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(3, 5, 8)
    made = plan(model, 2, example=x)
    by_name = {entry.name: entry.dense_macs for entry in made.layers}
    projections = {"self_attn.in_proj": 5 * 192, "self_attn.out_proj": 5 * 64}
    assert by_name == projections | {"linear1": 5 * 128, "linear2": 5 * 128}
    small = convert(model, made)
    assert made.dense_macs - made.factored_macs == count_macs(model, x) - count_macs(small, x)


def test_counting_leaves_modes_and_the_fused_attention_switch_as_they_were():
    model = nn.Sequential(nn.Linear(10, 4), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[0].eval()
    before = [module.training for module in model.modules()]
    was = torch.backends.mha.get_fastpath_enabled()
    with contextlib.suppress(KeyboardInterrupt), inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == before
    assert torch.backends.mha.get_fastpath_enabled() == was
    assert torch.is_grad_enabled()
