"""Factored layers compute what the dense layer with weight U S Vᵀ computes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from converter.decompose import Factors, decompose
from converter.errors import StiefelError
from converter.factors import (
    FactoredConv1d,
    FactoredConv2d,
    FactoredLinear,
    FactoredWeight,
    factored_layers,
)
from converter.schemes import SCHEMES, to_matrix

close = torch.testing.assert_close


def factored(layer: nn.Module, rank: int | None = None, scheme: str = "spatial"):
    if isinstance(layer, nn.Linear):
        weight = layer.weight.detach()
        return FactoredLinear.from_dense(layer, decompose(weight, rank or min(weight.shape)))
    matrix = to_matrix(layer.weight.detach(), scheme, layer.groups)
    kind = FactoredConv1d if isinstance(layer, nn.Conv1d) else FactoredConv2d
    return kind.from_dense(layer, decompose(matrix, rank or min(matrix.shape[-2:])), scheme)


@st.composite
def convolutions(draw, dims: st.SearchStrategy = st.sampled_from([1, 2])):  # noqa: B008
    """Any convolution there is, in float64, and an input for it."""
    count = draw(dims)
    axis = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(count))  # noqa: E731
    groups, mode = draw(st.integers(1, 2)), draw(st.sampled_from(["zeros", "reflect", "circular"]))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    layer = (nn.Conv1d, nn.Conv2d)[count - 1](
        3 * groups,
        4 * groups,
        axis(1, 4),
        stride=(1,) * count if padding == "same" else axis(1, 3),
        padding=axis(0, 2) if padding == "numbers" else padding,
        dilation=axis(1, 2),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    return layer, torch.randn(2, 3 * groups, *axis(8, 11), dtype=torch.float64)


@given(convolutions(), st.sampled_from(SCHEMES))
def test_full_rank_convolutions_are_exact(case, scheme):
    layer, x = case
    found = factored(layer, scheme=scheme)
    close(found(x), layer(x))
    close(found.dense()(x), layer(x))
    first, second = found.pair()
    close(second(first(x)), layer(x))
    assert found.weight_shape == layer.weight.shape
    assert (found.in_channels, found.out_channels) == (layer.in_channels, layer.out_channels)


@given(convolutions(), st.sampled_from(SCHEMES), st.integers(1, 3))
def test_low_rank_convolutions_equal_the_multiplied_out_kernel(case, scheme, rank):
    layer, x = case
    found = factored(layer, scheme=scheme)
    found.truncate_(torch.arange(min(rank, found.rank)))
    whole = found.dense()
    close(found(x), whole(x))
    close(found.pair()[1](found.pair()[0](x)), whole(x))
    close(found.weight.dense(), whole.weight.detach())
    close(found.weight.detach(), whole.weight.detach())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_lie_as_those_of_the_dense_layer(scheme, kernel, layout):
    dense = nn.Conv2d(4, 6, kernel, padding=kernel // 2)
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=layout)
    for layer in (dense, factored(dense, 2, scheme)):
        assert layer(x).is_contiguous(memory_format=layout)
    network = nn.Sequential(factored(dense, 2, scheme), nn.ReLU())
    if layout is torch.contiguous_format:  # as most tutorials flatten them
        assert network(x).view(2, -1).shape == (2, 150)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_linear_is_exact_for_any_leading_axes(shape, bias):
    layer, x = nn.Linear(5, 7, bias=bias).double(), torch.randn(shape).double()
    found = factored(layer)
    for module in (found, found.dense(), nn.Sequential(*found.pair())):
        close(module(x), layer(x))
    assert (found.rank, found.full_rank, found.matrix_shape) == (5, 5, (7, 5))


def test_gradients_are_those_of_the_product():
    found, x = factored(nn.Linear(6, 4).double(), 3), torch.randn(2, 6).double()
    found(x).square().sum().backward()
    weight = found.weight.dense().detach().requires_grad_()
    F.linear(x, weight, found.bias).square().sum().backward()
    close(found.U.grad, weight.grad @ (found.V * found.S).detach())
    close(found.V.grad, weight.grad.mT @ (found.U * found.S).detach())
    close(found.S.grad, (found.U.mT @ weight.grad @ found.V).diagonal().detach())


def test_bias_mode_and_frozen_weights_are_taken_over():
    layer = nn.Conv2d(3, 4, 3).eval()
    layer.weight.requires_grad_(False)
    found = factored(layer, 2)
    assert found.bias is layer.bias
    assert not found.training
    assert [p.requires_grad for p in (found.U, found.S, found.V)] == [False] * 3


def test_dense_and_pair_share_no_memory_with_the_factors():
    found = factored(nn.Linear(6, 4), 3)
    for module in (found.dense(), *found.pair()):
        for parameter in module.parameters():
            parameter.data.zero_()
    assert all(p.abs().sum() > 0 for p in found.parameters())


def test_truncation_keeps_the_chosen_directions_in_every_group():
    found = factored(nn.Conv2d(6, 8, 3, groups=2).double())
    U, S, V = (t.detach().clone() for t in found.factors())
    keep = torch.tensor([0, 2])
    found.U.requires_grad_(False)
    found.truncate_(keep)
    assert torch.equal(found.U, U[..., keep])
    assert torch.equal(found.S, S[..., keep])
    assert torch.equal(found.V, V[..., keep])
    assert found.rank == 2
    assert (found.U.requires_grad, found.V.requires_grad) == (False, True)


def test_a_factored_linears_weight_stands_in_for_it_without_being_formed(monkeypatch):
    found, x = factored(nn.Linear(6, 9).double(), 3), torch.randn(2, 6).double()
    whole = found.weight.dense()
    multiply = FactoredWeight.dense
    monkeypatch.setattr(FactoredWeight, "dense", lambda self: pytest.fail("W was formed"))
    close(F.linear(x, found.weight, found.bias), F.linear(x, whole, found.bias))
    close(F.linear(input=x, weight=found.weight), F.linear(x, whole))
    close(F.linear(x, found.weight[3:6], found.bias[3:6]), F.linear(x, whole[3:6], found.bias[3:6]))
    assert (found.weight.device, found.weight.dtype) == (whole.device, whole.dtype)
    monkeypatch.setattr(FactoredWeight, "dense", multiply)
    close(torch.matmul(x, found.weight.T), x @ whole.T)
    close(found.weight.shape, whole.shape)
    close(torch.cat([found.weight, found.weight]), torch.cat([whole, whole]))
    torch.sum(found.weight).backward()
    assert found.U.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "operation",
    [
        lambda w, x: x @ w.T,
        lambda w, x: w @ x.T,
        lambda w, x: w + w,
        lambda w, x: 2 * w,
        lambda w, x: -w,
        lambda w, x: w / 2,
        lambda w, x: x[0, :, None].expand(6, 6) @ w.T,
        lambda w, x: w - 1,
        lambda w, x: torch.stack([w, w], 0),
    ],
)
def test_arithmetic_on_a_stand_in_is_arithmetic_on_the_weight(operation):
    found, x = factored(nn.Linear(6, 9).double(), 3), torch.randn(2, 6).double()
    close(operation(found.weight, x), operation(found.weight.dense(), x))


def test_shared_layers_are_found_once():
    layer = factored(nn.Linear(4, 4), 2)
    assert list(factored_layers(nn.Sequential(layer, nn.ReLU(), layer))) == ["0"]


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(StiefelError, match=r"U \(4, 2\), S \(3,\), V \(5, 3\)"):
        FactoredLinear(*Factors(torch.zeros(4, 2), torch.zeros(3), torch.zeros(5, 3)))
