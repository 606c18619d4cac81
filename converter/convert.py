"""convert(model, plan) → a factored copy of the model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from converter.calibration import Calibration, fit_to, narrow, widen
from converter.errors import StiefelError
from converter.layers import closed, find_layers, install, prepared
from converter.planning import plan
from converter.rank_plan import RankPlan
from converter.reconstruction import reconstruct
from converter.refinement import refine
from converter.revision import check_plan, revise
from converter.spectra import Progress, calibrated, layer_factors

__all__ = ["convert", "plan", "revise"]


def convert(
    model: nn.Module,
    plan: RankPlan,
    *,
    calibration: Tensor | None = None,
    settings: Calibration | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> nn.Module:
    """A factored copy of a model, of the same class and with the same forward signature.

    Args:
        model: the model that was planned for; it is left as it is.
        plan: see `plan`; may have been edited, or read from JSON (see `revise`).
        calibration: unlabelled images (N, C, H, W), normalised, to keep accuracy by; see
            `converter.calibration`.
        settings: which calibration steps run.
        device: where to calibrate and decompose; the result lies where the model does.
        progress: called with (layer name, layers done, layers).

    Returns:
        The copy, in the model's training mode, with the plan as its attribute `stiefel_plan`.

    Raises:
        StiefelError: the plan is none or for another model, or asks for what can't be.
    """
    if not isinstance(plan, RankPlan):
        raise StiefelError(f"convert takes a plan, not {plan!r}: give plan(model, {plan!r})")
    ready = prepared(model)
    was = widen(ready) if calibration is not None else {}
    found = {layer.name: layer for layer in find_layers(ready)}
    check_plan(plan, found)
    settings, device = settings or Calibration(), torch.device(device)
    planned = [found[entry.name] for entry in plan.factored]
    moments = calibrated(ready, calibration, planned, settings, device, progress)
    new: dict[str, nn.Module] = {}
    errors: dict[str, float | None] = {}
    for done, entry in enumerate(plan.factored):
        if progress:
            progress(entry.name, done, len(plan.factored))
        layer = found[entry.name]
        if entry.tied_to is not None:
            factors, errors[entry.name] = new[entry.tied_to].factors(), errors[entry.tied_to]
        else:
            factors, error = layer_factors(layer, entry, plan, device, moments)
            errors[entry.name] = error
        new[entry.name] = layer.factored(factors, entry.scheme)
    if calibration is None:
        small = install(ready, new)
    else:
        small = install(copy.deepcopy(ready), new)
        _reconstruct(ready, small, plan, calibration, settings, device, progress)
        narrow(small, was)
    small = closed(small)
    # An edited plan's errors may be those of other ranks.
    layers = tuple(
        entry.model_copy(update={"expected_error": errors.get(entry.name, entry.expected_error)})
        for entry in plan.layers
    )
    small.stiefel_plan = plan.model_copy(update={"layers": layers}).without_spectra()
    if progress:
        progress("converted", len(new), len(new))
    return small


def _reconstruct(
    dense: nn.Module,
    small: nn.Module,
    plan: RankPlan,
    images: Tensor,
    settings: Calibration,
    device: torch.device,
    progress: Progress | None,
) -> None:
    """Reconstruct and refine on a device; the factored model comes back to where it was."""
    home = next(small.parameters()).device
    dense.to(device)
    small.to(device)
    images = fit_to(images, dense, device)
    reconstruct(dense, small, plan, images, settings, progress)
    if settings.refine_steps:
        refine(dense, small, images, settings, progress)
    small.to(home)
