"""What a model consists of, layer by layer: for looking at, not for changing."""

import torch
from pydantic import Field
from torch import Tensor, nn

from converter.cost import count_macs, count_parameters, dense_macs, layer_calls, macs_per_rank
from converter.decompose import Factors
from converter.layers import Layer, find_layers, prepared
from converter.rank_plan import RankPlan
from converter.settings import Settings


class LayerReport(Settings):
    """One layer as it is."""

    name: str = Field(description="the layer, as in model.named_modules()")
    kind: str = Field(description="Linear, Conv2d, …; 'factored Conv2d' once it is")
    shape: tuple[int, ...] = Field(description="shape of the dense weight")
    scheme: str | None = Field(description="spatial or channel, of a factored convolution")
    rank: int | None = Field(description="rank of a factored layer")
    full_rank: int = Field(description="the rank at which nothing is lost; 0 where it has none")
    parameters: int = Field(description="parameters, bias included")
    macs: int | None = Field(description="multiply-accumulates of one image")
    error: float | None = Field(
        description="relative Frobenius error against the dense weight, as expected at conversion"
    )
    reason: str | None = Field(description="why the layer is dense")


class Inspection(Settings):
    """A model's layers and totals."""

    layers: tuple[LayerReport, ...] = Field(description="every layer with a weight, in model order")
    parameters: int = Field(description="parameters of the whole model")
    macs: int = Field(description="multiply-accumulates of one image, whole model")


def inspect(model: nn.Module, example: Tensor) -> Inspection:
    """Describe every weighty layer of a dense or factored model.

    Args:
        model: any model; it is only read. A conversion's plan, where it carries one
            (`model.stiefel_plan`), tells the errors and why layers stayed dense.
        example: a batch (N, C, H, W), to count multiply-accumulates by.
    """
    ready = prepared(model, share=True)
    calls = layer_calls(ready, example)
    plan: RankPlan | None = getattr(model, "stiefel_plan", None)
    planned = {entry.name: entry for entry in plan.layers} if plan else {}
    rows = []
    for layer in find_layers(ready):
        entry = planned.get(layer.name)
        rank = layer.module.rank if layer.is_factored else None
        reason = layer.refusal or layer.advice
        if entry is not None:
            reason = entry.reason
        rows.append(
            LayerReport(
                name=layer.name,
                kind=layer.kind,
                shape=layer.weight_shape,
                scheme=layer.schemes[0] if layer.is_factored else None,
                rank=rank,
                full_rank=_full_rank(layer),
                parameters=layer.parameters,
                macs=_macs(layer, calls.get(layer.name)),
                # A rank that has fallen since makes another error.
                error=entry.expected_error if entry and rank and entry.rank == rank else None,
                reason=None if layer.is_factored else reason or "not converted",
            )
        )
    return Inspection(
        layers=tuple(rows), parameters=count_parameters(model), macs=count_macs(ready, example)
    )


@torch.no_grad()
def spectra(model: nn.Module, scheme: str = "spatial") -> dict[str, list[float]]:
    """Singular values of each layer that can be factored, falling; of a group's mean where grouped.

    A factored layer shows its S, as far as its rank goes.
    """
    found = {}
    for layer in find_layers(prepared(model, share=True)):
        if layer.refusal or layer.tied_to:
            continue
        matrix = layer.matrix(scheme if scheme in layer.schemes else layer.schemes[0])
        values = matrix.S if isinstance(matrix, Factors) else torch.linalg.svdvals(matrix.float())
        values = values.abs().reshape(-1, values.shape[-1]).mean(0)
        found[layer.name] = values.sort(descending=True).values.tolist()
    return found


def _full_rank(layer: Layer) -> int:
    if layer.refusal:
        return 0
    return layer.module.full_rank if layer.is_factored else min(layer.shape(layer.schemes[0]))


def _macs(layer: Layer, calls: list | None) -> int | None:
    if calls is None:
        return None
    if layer.is_factored:
        per_rank = macs_per_rank(layer.weight_shape, layer.schemes[0], layer.groups, calls)
        return layer.module.rank * per_rank
    return dense_macs(layer.weight_shape, calls)
