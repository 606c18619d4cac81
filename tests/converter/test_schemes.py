"""Kernels as matrices: the reshape loses nothing, and its two kernels convolve as the one did."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from converter import schemes
from converter.errors import StiefelError

KERNELS = st.one_of(st.tuples(st.integers(1, 7)), st.tuples(st.integers(1, 4), st.integers(1, 4)))


@given(KERNELS, st.sampled_from(schemes.SCHEMES), st.integers(1, 3), st.integers(1, 3))
def test_a_kernel_survives_the_way_to_its_matrix_and_back(kernel_size, scheme, groups, channels):
    kernel = torch.randn(2 * groups, channels, *kernel_size)
    matrix = schemes.to_matrix(kernel, scheme, groups)
    shape = schemes.matrix_shape(kernel.shape, scheme, groups)
    assert matrix.shape == (shape if groups == 1 else (groups, *shape))
    assert torch.equal(schemes.from_matrix(matrix, scheme, kernel.shape, groups), kernel)


def test_the_spatial_matrix_is_the_papers():
    kernel = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    matrix = schemes.to_matrix(kernel, "spatial")
    assert matrix.shape == (2 * 5, 3 * 4)
    for n, c, h, w in [(0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 3)]:
        assert matrix[n * 5 + w, c * 4 + h] == kernel[n, c, h, w]


@given(KERNELS, st.sampled_from(schemes.SCHEMES), st.integers(1, 3))
def test_two_small_convolutions_make_the_large_one(kernel_size, scheme, groups):
    m, n = schemes.matrix_shape((4 * groups, 3, *kernel_size), scheme, groups)
    lead = () if groups == 1 else (groups,)
    U, V = torch.randn(*lead, m, 2).double(), torch.randn(*lead, n, 2).double()
    kernel = schemes.from_matrix(U @ V.mT, scheme, (4 * groups, 3, *kernel_size), groups)
    convolve = (F.conv1d, F.conv2d)[len(kernel_size) - 1]
    x = torch.randn(2, 3 * groups, *(8,) * len(kernel_size)).double()
    first = schemes.first_kernel(V, scheme, kernel_size, 3 * groups, groups)
    second = schemes.second_kernel(U, scheme, kernel_size, 4 * groups)
    twice = convolve(convolve(x, first, groups=groups), second, groups=groups)
    torch.testing.assert_close(twice, convolve(x, kernel, groups=groups))


def test_what_does_not_fit_is_refused_by_shape():
    with pytest.raises(StiefelError, match="choose from spatial, channel"):
        schemes.check_scheme("diagonal")
    with pytest.raises(StiefelError, match=r"\(4, 5\) does not fit kernel \(4, 3, 2, 2\)"):
        schemes.from_matrix(torch.zeros(4, 5), "spatial", (4, 3, 2, 2))
