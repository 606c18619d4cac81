"""The peer: tensorly-torch, which factors layers by Tucker; `pip install -e ".[bench]"`."""

import math

from torch import nn


def tucker(module: nn.Conv2d | nn.Linear, rank: float | tuple[int, ...]) -> nn.Module:
    """The layer with its weight in Tucker form; a linear layer's weight stays a matrix.

    Args:
        rank: of each mode (out, in, H, W), or the share of the weight's numbers to aim at.

    Raises:
        ImportError: tensorly-torch is not installed.
    """
    import tensorly
    from tltorch import FactorizedConv, FactorizedLinear

    tensorly.set_backend("pytorch")
    if isinstance(module, nn.Conv2d):
        return FactorizedConv.from_conv(module, rank=rank, factorization="tucker")
    return FactorizedLinear.from_linear(
        module,
        rank=rank,
        factorization="tucker",
        auto_tensorize=False,
        in_tensorized_features=(module.in_features,),
        out_tensorized_features=(module.out_features,),
    )


def channel_ranks(module: nn.Conv2d, fraction: float) -> tuple[int, ...]:
    """Ranks (out, in, H, W) at this fraction of both channel counts; kernels stay whole."""
    rows, columns, *kernel = module.weight.shape
    return (max(1, round(fraction * rows)), max(1, round(fraction * columns)), *kernel)


def tucker_parameters(module: nn.Conv2d, rank: tuple[int, ...]) -> int:
    """Numbers in the core and the factors."""
    return math.prod(rank) + sum(n * r for n, r in zip(module.weight.shape, rank, strict=True))
