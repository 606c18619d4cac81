"""Small models for the export room, with batch norms whose statistics matter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from converter.convert import convert, plan


def stir(model: nn.Module) -> nn.Module:
    """Random statistics and affine parameters for every batch norm; eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, -1)):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, 2.0)
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
    return model.eval()


def factor(model: nn.Module, rank: int | float | str = 0.25, **options) -> nn.Module:
    """Stirred and factored, every layer that allows it."""
    return convert(stir(model), plan(model, rank, **options))


@pytest.fixture(name="factor", scope="session")
def _factor() -> Callable[..., nn.Module]:
    return factor


@pytest.fixture(name="stir", scope="session")
def _stir() -> Callable[[nn.Module], nn.Module]:
    return stir


@pytest.fixture(name="distance", scope="session")
def _distance() -> Callable[..., float]:
    """How far two models' outputs are apart, relative to the first's magnitude, in float64."""

    def distance(one: nn.Module, other: nn.Module, x: Tensor) -> float:
        with torch.no_grad():
            a, b = one.double().eval()(x.double()), other.double()(x.double())
        return float((a - b).abs().max() / a.abs().max())

    return distance
