"""Modules that own U, S, V: a layer W = U diag(S) Vᵀ that never forms W.

U (m, r) and V (n, r) have orthonormal columns and S (r,) is nonnegative where a decomposition made
them; training keeps them so (`trainers.manifold`). Grouped convolutions carry a leading group axis:
U (G, m, r), S (G, r), V (G, n, r).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converter import schemes
from converter.decompose import Factors
from converter.errors import StiefelError
from converter.stand_in import FactoredWeight, factored_linear


class Factored(nn.Module):
    """Base of every leaf that owns U, S, V and perhaps a bias."""

    U: nn.Parameter
    S: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None = None):
        super().__init__()
        if U.shape[-1] != S.shape[-1] or V.shape[-1] != S.shape[-1] or U.ndim != S.ndim + 1:
            raise StiefelError(
                f"factors do not fit together: U {tuple(U.shape)}, S {tuple(S.shape)}, "
                f"V {tuple(V.shape)} should be (m, r), (r,), (n, r)"
            )
        self.U, self.S, self.V = _parameter(U), _parameter(S), _parameter(V)
        self.register_parameter("bias", None if bias is None else _parameter(bias))

    @property
    def rank(self) -> int:
        """r, the number of directions kept."""
        return self.S.shape[-1]

    @property
    def full_rank(self) -> int:
        """min(m, n): the rank at which the layer loses nothing."""
        return min(self.U.shape[-2], self.V.shape[-2])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n) of the matrix that is factored, of one group where there are several."""
        return self.U.shape[-2], self.V.shape[-2]

    @property
    def weight(self) -> FactoredWeight:
        """Stands in for the dense weight where a model reads it; see :class:`FactoredWeight`."""
        return FactoredWeight(self.U, self.S, self.V, self)

    def factors(self) -> Factors:
        """The three parameters."""
        return Factors(self.U, self.S, self.V)

    def unflatten_matrix(self, matrix: Tensor) -> Tensor:
        """The factored matrix in the shape of the dense layer's weight."""
        return matrix

    @torch.no_grad()
    def truncate_(self, keep: Tensor) -> None:
        """Keep only the directions with indices `keep` (k,) int64; new Parameters replace the old.

        Grouped layers keep the same indices in every group.
        """
        keep = torch.as_tensor(keep, dtype=torch.long, device=self.S.device)
        for name in ("U", "S", "V"):
            old = getattr(self, name)
            new = nn.Parameter(old.index_select(-1, keep), requires_grad=old.requires_grad)
            setattr(self, name, new)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense layer's weight."""
        return self.matrix_shape

    def with_factors(self, factors: Factors) -> Factored:
        """A layer like this one, bias shared, on other factors."""
        new = copy.copy(self)
        new._parameters = dict(self._parameters)
        for name, tensor in zip(("U", "S", "V"), factors, strict=True):
            old = self._parameters[name]
            new._parameters[name] = _parameter(tensor).requires_grad_(old.requires_grad)
        return new

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """The plain torch layer with W multiplied out."""
        raise NotImplementedError

    @torch.no_grad()
    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Two plain torch layers, first √S Vᵀ then U √S with the bias: the layer without S."""
        raise NotImplementedError


class FactoredLinear(Factored):
    """y = U diag(S) Vᵀ x + bias, for x (..., n) to y (..., m).

    Args:
        U: (m, r); S: (r,); V: (n, r); bias: (m,) or None. All of one dtype.
    """

    @classmethod
    def from_dense(cls, layer: nn.Linear, factors: Factors) -> FactoredLinear:
        """Take over a linear layer's bias, training mode and `requires_grad`."""
        return _inherit(cls(*factors, layer.bias), layer)

    @property
    def in_features(self) -> int:
        """n."""
        return self.V.shape[0]

    @property
    def out_features(self) -> int:
        """m."""
        return self.U.shape[0]

    @property
    def weight(self) -> FactoredWeight:
        """Stands in for W (m, n); `F.linear` with it runs the two small products."""
        return FactoredWeight(self.U, self.S, self.V)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) → (..., m)."""
        return factored_linear(x, self.U, self.S, self.V, self.bias)

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        """nn.Linear with weight U diag(S) Vᵀ (m, n)."""
        return _plain_linear(self.factors().matrix(), self.bias, self.training)

    @torch.no_grad()
    def pair(self) -> tuple[nn.Linear, nn.Linear]:
        """nn.Linear n → r without bias, then nn.Linear r → m."""
        root = self.S.clamp(min=0).sqrt()
        first = _plain_linear((self.V * root).mT, None, self.training)
        return first, _plain_linear(self.U * root, self.bias, self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} -> {self.out_features}, rank={self.rank} of {self.full_rank}, "
            f"bias={self.bias is not None}"
        )


@dataclass(frozen=True)
class _Half:
    """Geometry of one of the two convolutions."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]


class _FactoredConv(Factored):
    """A convolution as two: C → r, then r → N; see `schemes` for which kernel axis goes where.

    Each axis is strided, padded and dilated in the one convolution whose kernel covers it. Padding
    of an axis commutes with a convolution along the other, so all padding modes stay exact.
    """

    dims: int
    dense_class: type[nn.Conv1d] | type[nn.Conv2d]

    def __init__(
        self,
        U: Tensor,
        S: Tensor,
        V: Tensor,
        bias: Tensor | None = None,
        *,
        scheme: schemes.Scheme,
        kernel_size: Sequence[int],
        stride: Sequence[int] | None = None,
        padding: Sequence[int] | str | None = None,
        dilation: Sequence[int] | None = None,
        groups: int = 1,
        padding_mode: str = "zeros",
    ):
        super().__init__(U, S, V, bias)
        ones, zeros = (1,) * self.dims, (0,) * self.dims
        self.scheme = schemes.check_scheme(scheme)
        self.kernel_size = tuple(kernel_size)
        self.stride = tuple(stride or ones)
        self.padding = padding if isinstance(padding, str) else tuple(padding or zeros)
        self.dilation = tuple(dilation or ones)
        self.groups = groups
        self.padding_mode = padding_mode
        k1, k2 = schemes.split_kernel(self.kernel_size, self.scheme)
        self.in_channels = V.shape[-2] * groups // math.prod(k1)
        self.out_channels = U.shape[-2] * groups // math.prod(k2)
        # An axis belongs to the second convolution only if its kernel is there.
        self._first = self._half(k1, [k == 1 for k in k2])
        self._second = self._half(k2, [k != 1 for k in k2])

    @classmethod
    def from_dense(
        cls, layer: nn.Conv1d | nn.Conv2d, factors: Factors, scheme: schemes.Scheme
    ) -> _FactoredConv:
        """Take over a convolution's geometry, bias, training mode and `requires_grad`."""
        new = cls(
            *factors,
            layer.bias,
            scheme=scheme,
            kernel_size=layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
        )
        return _inherit(new, layer)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(N, C/G, *K) of the dense kernel."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def unflatten_matrix(self, matrix: Tensor) -> Tensor:
        """(m, n) or (G, m, n) → (N, C/G, *K)."""
        return schemes.from_matrix(matrix, self.scheme, self.weight_shape, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *L) → (N, out_channels, *L')."""
        # S scales the small kernel rather than the activations.
        first = self._first_kernel(self.V * self.S.unsqueeze(-2))
        h = self._convolve(x, first, None, self._first)
        return self._convolve(h, self._second_kernel(self.U), self.bias, self._second)

    @torch.no_grad()
    def dense(self) -> nn.Conv1d | nn.Conv2d:
        """The plain convolution with its kernel multiplied out."""
        whole = _Half(self.kernel_size, self.stride, self.padding, self.dilation)
        kernel = self.unflatten_matrix(self.factors().matrix())
        return self._plain(kernel, self.bias, whole)

    @torch.no_grad()
    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Two plain convolutions: C → G·r without bias, then G·r → N."""
        root = self.S.clamp(min=0).sqrt().unsqueeze(-2)
        first = self._plain(self._first_kernel(self.V * root), None, self._first)
        return first, self._plain(self._second_kernel(self.U * root), self.bias, self._second)

    def extra_repr(self) -> str:
        rest = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        rest |= {"groups": self.groups, "padding_mode": self.padding_mode}
        return (
            f"{self.in_channels} -> {self.out_channels}, {self.scheme}, "
            f"rank={self.rank} of {self.full_rank}, kernel_size={self.kernel_size}, "
            + ", ".join(f"{k}={v}" for k, v in rest.items())
            + f", bias={self.bias is not None}"
        )

    def _half(self, kernel_size: tuple[int, ...], mine: list[bool]) -> _Half:
        def pick(values, neutral: int) -> tuple[int, ...]:
            return tuple(v if own else neutral for v, own in zip(values, mine, strict=True))

        padding = self.padding
        if padding == "valid":
            padding = (0,) * self.dims
        return _Half(
            kernel_size=kernel_size,
            stride=pick(self.stride, 1),
            # "same" pads by kernel size, so the axes that are the other's get none.
            padding=padding if isinstance(padding, str) else pick(padding, 0),
            dilation=pick(self.dilation, 1),
        )

    def _first_kernel(self, V: Tensor) -> Tensor:
        return schemes.first_kernel(V, self.scheme, self.kernel_size, self.in_channels, self.groups)

    def _second_kernel(self, U: Tensor) -> Tensor:
        return schemes.second_kernel(U, self.scheme, self.kernel_size, self.out_channels)

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None, half: _Half) -> Tensor:
        convolution = (F.conv1d, F.conv2d)[self.dims - 1]
        padding = half.padding
        if self.padding_mode != "zeros" and any(pads := _pads(half)):
            x, padding = F.pad(x, pads, mode=self.padding_mode), 0
        if x.is_contiguous():
            # Maps come to lie as the kernel does, and a transposed factor's would be channels-last,
            # which a network that flattens them with `view` can't take.
            kernel = kernel.clone(memory_format=torch.contiguous_format)
        return convolution(x, kernel, bias, half.stride, padding, half.dilation, self.groups)

    def _plain(self, kernel: Tensor, bias: Tensor | None, half: _Half) -> nn.Module:
        layer = nn.utils.skip_init(
            self.dense_class,
            kernel.shape[1] * self.groups,
            kernel.shape[0],
            half.kernel_size,
            stride=half.stride,
            padding=half.padding,
            dilation=half.dilation,
            groups=self.groups,
            bias=bias is not None,
            padding_mode=self.padding_mode,
        )
        return _fill(layer, kernel, bias, self.training)


class FactoredConv1d(_FactoredConv):
    """A factored nn.Conv1d, (N, C, L) → (N, out_channels, L')."""

    dims = 1
    dense_class = nn.Conv1d


class FactoredConv2d(_FactoredConv):
    """A factored nn.Conv2d, (N, C, H, W) → (N, out_channels, H', W')."""

    dims = 2
    dense_class = nn.Conv2d


def factored_layers(model: nn.Module) -> dict[str, Factored]:
    """Every factored layer by its name, in registration order, a shared module once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Factored)}


def _parameter(tensor: Tensor) -> nn.Parameter:
    """The same Parameter if it is one (ties survive), else a contiguous new one."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.contiguous())


def _inherit(new: Factored, old: nn.Module) -> Factored:
    """Keep the training mode, and freeze the factors where the dense weight was frozen."""
    for parameter in (new.U, new.S, new.V):
        parameter.requires_grad_(old.weight.requires_grad)
    return new.train(old.training)


def _fill(layer: nn.Module, weight: Tensor, bias: Tensor | None, training: bool) -> nn.Module:
    """Give a plain layer its tensors, as copies."""
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer.train(training)


def _plain_linear(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    out_features, in_features = weight.shape
    layer = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias is not None)
    return _fill(layer, weight, bias, training)


def _pads(half: _Half) -> list[int]:
    """F.pad's list (last axis first, before and after), as nn.Conv pads."""
    pads: list[int] = []
    for axis in reversed(range(len(half.kernel_size))):
        if half.padding == "same":
            total = half.dilation[axis] * (half.kernel_size[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [half.padding[axis]] * 2
    return pads
