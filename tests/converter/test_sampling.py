"""Sampled rows are what a layer multiplies its weight with, wherever they are taken."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from converter import sampling, schemes
from converter.factors import FactoredConv2d
from converter.schemes import to_matrix

MODES = ["zeros", "reflect", "replicate", "circular"]


def rows_of(module, x, wanted=7):
    y = module(x)
    at = sampling.positions("a", len(x), sampling.places(module, y, len(x)), wanted)
    size = () if sampling.is_linear(module) else tuple(y.shape[2:])
    return sampling.input_rows(module, x, size, at), sampling.output_rows(module, y, at), at


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.one_of(st.sampled_from(["valid"]), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    mode=st.sampled_from(MODES),
)
def test_weight_times_input_rows_is_output_rows(kernel, stride, padding, dilation, mode):
    module = nn.Conv2d(
        3, 4, kernel, stride, padding, dilation, bias=False, padding_mode=mode
    ).double()
    x, y, _ = rows_of(module, torch.randn(2, 3, 8, 9, dtype=torch.float64))
    torch.testing.assert_close(x @ module.weight.flatten(1).mT, y)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 4, (3, 2), padding="same", dilation=2, bias=False),
        nn.Conv1d(3, 4, 3, stride=2, padding=1, bias=False),
        nn.Conv1d(3, 4, 2, padding="same", padding_mode="circular", bias=False),
    ],
    ids=["same", "1d", "1d same"],
)
def test_padding_by_name_and_one_axis_are_followed(module):
    shape = (2, 3, 9, 9)[: 2 + len(module.kernel_size)]
    x, y, _ = rows_of(module.double(), torch.randn(shape, dtype=torch.float64))
    torch.testing.assert_close(x @ module.weight.flatten(1).mT, y)


@pytest.mark.parametrize("shape", [(5, 6), (5, 8, 6), (5, 2, 4, 6)], ids=str)
def test_rows_of_a_linear_layer_are_its_tokens(shape):
    module = nn.Linear(6, 3, bias=False).double()
    x, y, at = rows_of(module, torch.randn(shape, dtype=torch.float64), wanted=3)
    assert len(x) == at.numel()
    torch.testing.assert_close(module(x), y)


def test_a_factored_convolution_takes_the_rows_of_the_dense_one():
    dense = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
    factors = torch.linalg.svd(to_matrix(dense.weight.detach(), "spatial"), full_matrices=False)
    small = FactoredConv2d.from_dense(dense, (factors.U, factors.S, factors.Vh.mT), "spatial")
    x = torch.randn(2, 3, 8, 8)
    for mine, theirs in zip(rows_of(small, x), rows_of(dense, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@given(images=st.integers(1, 5), places=st.integers(1, 40), wanted=st.integers(1, 50))
def test_positions_are_distinct_places_and_the_same_in_every_pass(images, places, wanted):
    at = sampling.positions("layer1.conv", images, places, wanted)
    assert at.shape == (images, min(wanted, places))
    assert at.min() >= 0
    assert at.max() < places
    assert all(len(set(row)) == len(row) for row in at.tolist())
    assert torch.equal(at, sampling.positions("layer1.conv", images, places, wanted))


@pytest.mark.parametrize("scheme", schemes.SCHEMES)
def test_the_moment_of_columns_follows_from_that_of_rows(scheme):
    rows = torch.randn(50, 2 * 3 * 3, dtype=torch.float64)
    columns = sampling.column_rows(rows, scheme, 3)
    assert columns.shape[1] == schemes.matrix_shape((4, 2, 3, 3), scheme, 1)[1]
    torch.testing.assert_close(
        sampling.column_moment(rows.mT @ rows / len(rows), scheme, 3),
        columns.mT @ columns / len(columns),
    )


def test_grouped_convolutions_and_other_layers_are_not_sampled():
    assert sampling.can_sample(nn.Conv2d(4, 4, 3))
    assert not sampling.can_sample(nn.Conv2d(4, 4, 3, groups=2))
    assert not sampling.can_sample(nn.BatchNorm2d(4))
