"""A plan that was read, and perhaps edited, against the model that it is for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from converter.budgets import Decision
from converter.calibration import Calibration, widen
from converter.errors import StiefelError, did_you_mean
from converter.layers import Layer, find_layers, prepared
from converter.planning import assemble, count, example_for
from converter.rank_plan import RankPlan, check_rank
from converter.spectra import Decomposer, Progress, calibrated


def revise(
    model: nn.Module,
    plan: RankPlan,
    *,
    example: Tensor | None = None,
    calibration: Tensor | None = None,
    settings: Calibration | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> RankPlan:
    """The plan's schemes and ranks, and whatever follows from them found anew; the model is read.

    A layer that the plan doesn't name is kept. Of layers that share a weight, the owner's entry
    counts. A plan's latency stays where the schemes and ranks are those that were timed.

    Args:
        model: the model that was planned for.
        plan: see `converter.planning.plan`, which also has the other arguments.

    Raises:
        StiefelError: the plan is for another model, or asks for what can't be.
    """
    ready = prepared(model, share=calibration is None)
    if calibration is not None:
        widen(ready)
    found = find_layers(ready)
    check_plan(plan, {layer.name: layer for layer in found})
    example = example_for(ready, example, calibration)
    owners = [layer for layer in found if layer.tied_to is None]
    ranked = [layer for layer in owners if layer.name in plan.names and plan[layer.name].rank]
    device = torch.device(device)
    moments = calibrated(ready, calibration, ranked, settings, device, progress)
    decompose = Decomposer(device, moments)
    decisions = {layer.name: _decision(layer, plan) for layer in owners}
    for done, layer in enumerate(ranked):
        if progress:
            progress("plan", done, len(ranked))
        decompose(layer, decisions[layer.name].scheme, decisions[layer.name].rank)
    counts = count(ready, example)
    return assemble(found, decisions, decompose, counts, plan.policy, {}).with_latency_of(plan)


def check_plan(plan: RankPlan, found: Mapping[str, Layer]) -> None:
    """Refuse a plan that was made for another model, naming the first layer that differs."""
    for entry in plan.factored:
        layer = found.get(entry.name)
        if layer is None:
            raise StiefelError(
                f"the plan's layer '{entry.name}' is not in the model"
                f"{did_you_mean(entry.name, found)}"
            )
        if layer.refusal:
            raise StiefelError(f"{entry.name} cannot be factored: {layer.refusal}")
        if tuple(layer.weight_shape) != tuple(entry.shape):
            raise StiefelError(
                f"the plan's layer '{entry.name}' has weight {tuple(entry.shape)}, the model's has "
                f"{tuple(layer.weight_shape)}: the plan is for another model"
            )
        if (entry.scheme is None) != (None in layer.schemes) and not layer.is_factored:
            raise StiefelError(f"{entry.name}: scheme {entry.scheme} does not suit a {layer.kind}")
        if entry.tied_to != layer.tied_to:
            raise StiefelError(f"{entry.name}: shares its weight in the model or plan only")
        check_rank(entry.name, entry.rank, layer.highest_rank(entry.scheme))


def _decision(layer: Layer, plan: RankPlan) -> Decision:
    """What the plan says of a layer that owns its weight."""
    if layer.name not in plan.names:
        return Decision(layer.schemes[0], None, layer.refusal or "not in the plan")
    entry = plan[layer.name]
    if entry.rank is None:
        scheme = entry.scheme if entry.scheme in layer.schemes else layer.schemes[0]
        return Decision(scheme, None, layer.refusal or entry.reason or "kept by request")
    # A factored layer keeps its own scheme.
    return Decision(layer.schemes[0] if layer.is_factored else entry.scheme, entry.rank)
