"""plan(model, policy) → RankPlan: what becomes of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from converter import cost, ranks
from converter.budgets import Decision, Menu, by_budget, by_latency
from converter.calibration import Calibration, widen
from converter.decompose import Spectrum
from converter.errors import StiefelError
from converter.latency import LatencyPrices
from converter.layers import Layer, find_layers, parameters_per_rank, prepared
from converter.prices import MacPrices, ParameterPrices
from converter.rank_plan import LayerPlan, RankPlan, check_rank, spectrum_error
from converter.ranks import Budget, Energy, Fixed, Policy, parse_rank
from converter.requests import Override, Request, read_requests
from converter.sensitivity import sensitivities
from converter.spectra import Decomposer, Progress, calibrated


def plan(
    model: nn.Module,
    rank: Policy | str | int | float,
    *,
    scheme: str = "spatial",
    example: Tensor | None = None,
    calibration: Tensor | None = None,
    settings: Calibration | None = None,
    layers: Mapping[str, Override] | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> RankPlan:
    """Choose a scheme and a rank for every layer; the model is only read.

    Args:
        model: dense, or factored already: factored layers can only fall in rank.
        rank: a policy, or how `parse_rank` reads one: 32, 0.25, "energy=0.95", "params=0.5", …
        scheme: "spatial", "channel", or "auto": whichever suits each layer better.
        example: an input batch (N, C, H, W), to count MACs by; budgets on MACs or latency need it,
            and latency is that of one pass of the whole batch.
        calibration: unlabelled images (N, C, H, W), normalised; errors are then in the norm of each
            layer's own inputs (unless settings.whitened is off).
        settings: of the calibration.
        layers: exceptions by glob over layer names, of which the last that matches wins: "keep",
            or a mapping with "rank" (a policy that is no budget) or "scheme" or both. A rank given
            here is obeyed even where it saves nothing.
        device: where to decompose, and where latency is measured.
        progress: called with ("plan", layers done, layers).

    Raises:
        StiefelError: a policy, scheme, glob or rank that can't be, or a budget out of reach.
    """
    policy = parse_rank(rank)
    ready = prepared(model, share=calibration is None)
    if next(ready.parameters(), None) is None:
        raise StiefelError("the model has no parameters: there is nothing to factor")
    if calibration is not None:
        widen(ready)
    found = find_layers(ready)
    requests = read_requests(found, policy, scheme, layers or {})
    owners = [layer for layer in found if layer.tied_to is None]
    example = example_for(ready, example, calibration)
    moments = calibrated(ready, calibration, owners, settings, torch.device(device), progress)
    decompose = Decomposer(torch.device(device), moments)
    decisions: dict[str, Decision] = {}
    for done, layer in enumerate(owners):
        if progress:
            progress("plan", done, len(owners))
        request = requests[layer.name]
        if request.keep is not None:
            decisions[layer.name] = Decision(request.schemes[0], None, request.keep)
        elif isinstance(request.policy, Budget):
            for one in request.schemes:
                decompose(layer, one)
        else:
            decisions[layer.name] = _by_policy(layer, request, decompose)
    if isinstance(policy, Fixed):
        check_fixed(policy, found)
    if example is None and isinstance(policy, Budget) and policy.cost != "params":
        raise StiefelError(f"{policy} needs an example batch to run the model with")
    counts = count(ready, example)
    latency: dict[str, float] = {}
    if isinstance(policy, Budget):
        weights = {}
        if calibration is not None:
            free = [layer for layer in owners if layer.name not in decisions]
            chosen = settings or Calibration()
            weights = sensitivities(ready, calibration, free, chosen, torch.device(device))
        menu = Menu(owners, requests, decisions, decompose, progress, weights)
        if policy.cost == "latency":
            decisions, latency = _by_latency(policy, menu, ready, example, torch.device(device))
        else:
            on_params = policy.cost == "params"
            prices = (
                ParameterPrices(counts.parameters)
                if on_params
                else MacPrices(counts.macs, counts.calls)
            )
            decisions = by_budget(policy, menu, prices)
    if progress:
        progress("plan", len(owners), len(owners))
    return assemble(found, decisions, decompose, counts, str(policy), latency)


@dataclass(frozen=True)
class Counts:
    """What a model has and does: MACs and calls of its layers only where an example was run."""

    parameters: int
    macs: int | None
    calls: Mapping[str, Sequence[cost.Call]]


def count(model: nn.Module, example: Tensor | None) -> Counts:
    """Count a model, on an example (N, C, H, W) if there is one."""
    parameters = cost.count_parameters(model)
    if example is None:
        return Counts(parameters, None, {})
    return Counts(parameters, cost.count_macs(model, example), cost.layer_calls(model, example))


def example_for(
    model: nn.Module, example: Tensor | None, calibration: Tensor | None
) -> Tensor | None:
    """The example (N, C, H, W), or a calibration image, on the model's device in its precision."""
    if example is None and calibration is not None:
        example = calibration[:1]
    if example is None:
        return None
    return example.to(next(model.parameters()).device, cost.dtype_of(model))


def assemble(
    found: Sequence[Layer],
    decisions: Mapping[str, Decision],
    decompose: Decomposer,
    counts: Counts,
    policy: str,
    latency: Mapping[str, float],
) -> RankPlan:
    """The plan that decisions on the layers that own their weights come to; spectra are kept."""
    result = RankPlan(
        layers=tuple(
            _entry(layer, decisions[layer.tied_to or layer.name], counts, decompose.known)
            for layer in found
        ),
        policy=policy,
        dense_parameters=counts.parameters,
        dense_macs=counts.macs,
        **latency,
    )
    if latency:
        result = result.model_copy(update={"timed": result.fingerprint})
    result._spectra.update(decompose.known)
    return result


def _by_latency(
    policy: Budget, menu: Menu, model: nn.Module, example: Tensor, device: torch.device
) -> tuple[dict[str, Decision], dict[str, float]]:
    """Decisions under a latency budget, as measured on `device`."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        example = example.to(device)
        calls = cost.layer_calls(model, example, len(example))
        return by_latency(policy, menu, LatencyPrices(model, example, calls))
    finally:
        model.to(home)


def _by_policy(layer: Layer, request: Request, decompose: Decomposer) -> Decision:
    """One layer under a policy of ranks: the scheme of least tail energy + relative size."""
    refused: Decision | None = None
    best: tuple[float, Decision] | None = None
    for scheme in request.schemes:
        shape = layer.shape(scheme)
        found = decompose(layer, scheme) if isinstance(request.policy, Energy) else None
        rank = ranks.policy_rank(request.policy, min(shape), found)
        if request.forced and isinstance(request.policy, Fixed):
            check_rank(layer.name, rank, layer.highest_rank(scheme))
        worthwhile = layer.worthwhile_rank(scheme)
        if rank > (layer.highest_rank(scheme) if request.forced else worthwhile):
            refused = refused or Decision(scheme, None, _not_worth(layer, rank, worthwhile))
            continue
        size = rank * parameters_per_rank(shape, layer.groups) / layer.weight_parameters
        score = decompose(layer, scheme, rank).error(rank) ** 2 + size
        if best is None or score < best[0]:
            best = score, Decision(scheme, rank)
    return refused if best is None else best[1]


def _not_worth(layer: Layer, rank: int, worthwhile: int) -> str:
    if layer.is_factored:
        return f"already factored, at rank {layer.current_rank}"
    if worthwhile < 1:
        return "no rank would save parameters"
    return f"rank {rank} would not save parameters; {worthwhile} or less would"


def check_fixed(policy: Fixed, layers: Sequence[Layer]) -> None:
    """A common rank that no layer can have is a mistake; name the layer that comes nearest."""
    highest = {
        layer.name: max(layer.highest_rank(s) for s in layer.schemes)
        for layer in layers
        if layer.refusal is None
    }
    name = max(highest, key=highest.get, default=None)
    if name is not None:
        check_rank(f"{name}, the layer of highest rank", policy.rank, highest[name])


def _entry(
    layer: Layer,
    decision: Decision,
    counts: Counts,
    known: Mapping[tuple[str, str | None], Spectrum],
) -> LayerPlan:
    """What a decision on a layer comes to: parameters, MACs where they were counted, error."""
    scheme, shape = decision.scheme, layer.weight_shape
    can = layer.refusal is None
    counted, per_rank = None, None
    if counts.macs is not None and can:
        prices = MacPrices(counts.macs, counts.calls)
        counted = prices.current(layer)
        per_rank = prices.factored(layer, scheme, 1)
    per_rank_parameters = parameters_per_rank(layer.shape(scheme), layer.groups) if can else 0
    found = known.get((layer.tied_to or layer.name, scheme))
    return LayerPlan(
        name=layer.name,
        kind=layer.kind,
        scheme=scheme,
        rank=decision.rank,
        full_rank=min(layer.shape(scheme)) if can else 0,
        current_rank=layer.current_rank,
        shape=shape,
        groups=layer.groups,
        dense_parameters=layer.parameters - (layer.weight_parameters if layer.tied_to else 0),
        bias_parameters=layer.bias_parameters,
        parameters_per_rank=per_rank_parameters,
        dense_macs=counted,
        macs_per_rank=per_rank,
        expected_error=spectrum_error(found, decision.rank),
        reason=decision.reason,
        tied_to=layer.tied_to,
    )
