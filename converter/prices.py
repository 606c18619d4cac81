"""What a layer costs dense and at every rank, in the unit of a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from converter.cost import Call, dense_macs, macs_per_rank
from converter.layers import Layer, parameters_per_rank


class Prices(Protocol):
    """One unit of cost.

    Attributes:
        whole: cost of the whole model as it is.
    """

    whole: float

    def ranks(self, layer: Layer, scheme: str | None) -> Sequence[int]:
        """The ranks on offer."""
        ...

    def current(self, layer: Layer) -> float:
        """Cost of a layer as it is."""
        ...

    def factored(self, layer: Layer, scheme: str | None, rank: int) -> float:
        """Cost of a layer at a rank."""
        ...


class ParameterPrices:
    """Parameters."""

    def __init__(self, whole: int):
        self.whole = whole

    def ranks(self, layer: Layer, scheme: str | None) -> Sequence[int]:
        """All below the present one."""
        return range(1, layer.worthwhile_rank(scheme) + 1)

    def current(self, layer: Layer) -> float:
        """Weight and bias; those of a tied layer count with its owner."""
        return layer.weight_parameters + layer.bias_parameters

    def factored(self, layer: Layer, scheme: str | None, rank: int) -> float:
        """U, S, V and bias."""
        return rank * parameters_per_rank(layer.shape(scheme), layer.groups) + layer.bias_parameters


class MacPrices:
    """Multiply-accumulates of one image."""

    def __init__(self, whole: int, calls: Mapping[str, Sequence[Call]]):
        self.whole, self.calls = whole, calls

    def ranks(self, layer: Layer, scheme: str | None) -> Sequence[int]:
        """All below the present one."""
        return range(1, layer.highest_rank(scheme) + 1 - layer.is_factored)

    def current(self, layer: Layer) -> float:
        """All uses of the layer in one forward pass; 0 if it is not used."""
        calls = self.calls.get(layer.name, ())
        if layer.is_factored:
            return self.factored(layer, layer.schemes[0], layer.current_rank)
        return dense_macs(layer.weight_shape, calls)

    def factored(self, layer: Layer, scheme: str | None, rank: int) -> float:
        """Both convolutions or products, all uses."""
        calls = self.calls.get(layer.name, ())
        return rank * macs_per_rank(layer.weight_shape, scheme, layer.groups, calls)
