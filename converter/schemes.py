"""How a kernel becomes a matrix and back.

A convolution's kernel (N, C/G, *K) is read as a matrix whose truncated SVD is two convolutions:

* ``spatial``: the last axis of the kernel goes with the outputs, the others with the inputs. A
  kernel N×C×H×W becomes the (N·W)×(C·H) matrix of arXiv 2510.25594: an H×1 convolution from C to r
  channels, then a 1×W convolution from r to N.
* ``channel``: N×(C·H·W): r filters of H×W, then a 1×1 convolution.

A one-dimensional kernel is a two-dimensional one with H = 1. A linear weight is its own matrix.
All functions are pure and differentiable.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from converter.errors import StiefelError

Scheme = Literal["spatial", "channel"]
SCHEMES: tuple[str, ...] = get_args(Scheme)


def check_scheme(scheme: str) -> Scheme:
    """Return `scheme`, or raise StiefelError naming the schemes there are."""
    if scheme not in SCHEMES:
        raise StiefelError(f"unknown scheme '{scheme}'; choose from {', '.join(SCHEMES)}")
    return scheme  # type: ignore[return-value]


def split_kernel(
    kernel_size: Sequence[int], scheme: Scheme
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Kernel sizes of the first (C → r) and the second (r → N) convolution."""
    ones = (1,) * len(kernel_size)
    if scheme == "channel":
        return tuple(kernel_size), ones
    return (*kernel_size[:-1], 1), (*ones[:-1], kernel_size[-1])


def matrix_shape(
    kernel_shape: Sequence[int], scheme: Scheme | None, groups: int = 1
) -> tuple[int, int]:
    """(m, n) of one group's matrix, for a kernel (N, C/G, *K) or a linear weight (N, C)."""
    outputs, inputs, *kernel = kernel_shape
    if not kernel:
        return outputs, inputs
    first, second = split_kernel(kernel, scheme or "channel")
    return outputs // groups * math.prod(second), inputs * math.prod(first)


def to_matrix(kernel: Tensor, scheme: Scheme, groups: int = 1) -> Tensor:
    """Reshape a kernel (N, C/G, *K) to its matrix (m, n), or (G, m, n) when `groups` > 1.

    Rows are ordered (output channel, last axis), columns (input channel, leading axes) in the
    spatial scheme; rows (output channel), columns (input channel, all axes) in the channel scheme.
    """
    m, n = matrix_shape(kernel.shape, scheme, groups)
    if scheme == "spatial":
        kernel = kernel.movedim(-1, 1)
    return kernel.reshape((m, n) if groups == 1 else (groups, m, n))


def from_matrix(
    matrix: Tensor, scheme: Scheme, kernel_shape: Sequence[int], groups: int = 1
) -> Tensor:
    """The inverse of :func:`to_matrix`: a matrix (m, n) or (G, m, n) to a kernel (N, C/G, *K)."""
    outputs, inputs, *kernel = kernel_shape
    expected = matrix_shape(kernel_shape, scheme, groups)
    if matrix.shape != (expected if groups == 1 else (groups, *expected)):
        raise StiefelError(
            f"matrix {tuple(matrix.shape)} does not fit kernel {tuple(kernel_shape)} "
            f"({scheme}, groups={groups}), which wants {expected} per group"
        )
    if scheme == "channel":
        return matrix.reshape(outputs, inputs, *kernel)
    return matrix.reshape(outputs, kernel[-1], inputs, *kernel[:-1]).movedim(1, -1)


def first_kernel(
    V: Tensor, scheme: Scheme, kernel_size: Sequence[int], in_channels: int, groups: int = 1
) -> Tensor:
    """V (n, r) or (G, n, r) as the first convolution's kernel (G·r, C/G, *K₁)."""
    first, _ = split_kernel(kernel_size, scheme)
    return V.mT.reshape(-1, in_channels // groups, *first)


def second_kernel(
    U: Tensor, scheme: Scheme, kernel_size: Sequence[int], out_channels: int
) -> Tensor:
    """U (m, r) or (G, m, r) as the second convolution's kernel (N, r, *K₂)."""
    _, second = split_kernel(kernel_size, scheme)
    return U.reshape(out_channels, second[-1], -1).mT.reshape(out_channels, -1, *second)
