"""Sequential reconstruction: each layer in turn is solved for, on what those before it produce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from converter import sampling, schemes
from converter.calibration import (
    BATCH,
    WIDEST,
    Calibration,
    Progress,
    batch_norm_gain,
    channel_moments,
    channel_sums,
    check_images,
    match_batch_norm,
)
from converter.cost import inference
from converter.decompose import decompose
from converter.factors import Factored
from converter.flow import BatchNorm, Flow, trace
from converter.ranks import LayerPlan, RankPlan

_ROWS = 8192  # sampled rows that are taken to float64 at once


@torch.no_grad()
def reconstruct(
    dense: nn.Module,
    small: nn.Module,
    plan: RankPlan,
    images: Tensor,
    settings: Calibration,
    progress: Progress | None = None,
) -> None:
    """Fit the layers and batch norms of `small` to what `dense` does on the images.

    In one pass through each network: as the images reach a layer of `small`, all before it is
    final, so the layer is solved for there and then, and the pass goes on with the result. That
    holds the activations of all images at one layer, besides P sampled output rows for each layer.

    Args:
        dense: the prepared dense model.
        small: its factored copy, changed in place; both lie on the images' device.
        plan: what was factored, and how; layers that were not are refitted whole.
        images: (N, C, H, W) float32, normalised.
        settings: which steps run.
        progress: called with (layer, layers done, layers).
    """
    check_images(images)
    entries = _solvable(dense, plan) if settings.sequential else {}
    norms = _batch_norms(dense) if settings.match_batch_norm else []
    flow = trace(dense, entries, images)
    seen = _watch(dense, flow, list(entries), norms, images, settings)
    shortcuts: dict[str, Tensor] = {}
    done = 0

    def solve(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal done
            if progress:
                progress(name, done, len(entries))
            done += 1
            target = seen.rows.get(name)
            if target is None or target.calls > 1:
                return
            layer = dense.get_submodule(name)
            x = sampling.input_rows(module, inputs[0], target.size, target.at)
            y = target.rows()
            residual = flow.residuals.get(name)
            if residual is not None and target.shortcut and residual.shortcut in shortcuts:
                lost = target.lost(module, shortcuts.pop(residual.shortcut))
                gain = 1.0 if residual.norm is None else _gain(dense.get_submodule(residual.norm))
                y = seen.correct(name, residual.norm, y, settings.residual * lost / gain)
            centred = layer.bias is not None or (name in flow.normed and settings.match_batch_norm)
            refit(module, layer, entries[name], x, y, settings.ridge, centred)

        return hook

    def match(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name in seen.moments:
                match_batch_norm(module, dense.get_submodule(name), inputs[0], *seen.moments[name])

        return hook

    handles = [
        small.get_submodule(name).register_forward_pre_hook(make(name))
        for make, names in ((solve, entries), (match, norms))
        for name in names
    ]
    keep = {r.shortcut: partial(shortcuts.__setitem__, r.shortcut) for r in flow.residuals.values()}
    try:
        with inference(small):
            flow.run(small, images, keep)
    finally:
        for handle in handles:
            handle.remove()


def refit(
    module: nn.Module,
    layer: nn.Module,
    entry: LayerPlan,
    x: Tensor,
    y: Tensor,
    ridge: float,
    centred: bool,
) -> None:
    """Set a layer to the ridge regression of y (R, N) on x (R, C·K), truncated; in place.

    K* = argmin ‖y − K x‖² + ρ ‖K − W‖², then, if `module` is factored, the best approximation of
    K* of the entry's rank in the norm of x. Where centred, both are taken about their means, which
    the bias takes up if there is one.
    """
    weight = layer.weight.double().flatten(1)
    x_mean = x.mean(0, dtype=torch.float64) if centred else x.new_zeros((), dtype=torch.float64)
    y_mean = y.mean(0, dtype=torch.float64) if centred else x_mean
    moment = cross = 0
    for some, given in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
        some = some.double() - x_mean
        moment = moment + some.mT @ some / len(x)
        cross = cross + (given.double() - y_mean).mT @ some / len(x)
    # Few rows for many unknowns say less than the dense weight does.
    ridge = max(ridge, 0.1 * x.shape[1] / len(x))
    rho = ridge * moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    system = moment + rho * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    solution = torch.linalg.solve(system, (cross + rho * weight).mT).mT
    if isinstance(module, Factored):
        matrix = solution
        if entry.scheme is not None:
            matrix = schemes.to_matrix(solution.reshape(layer.weight.shape), entry.scheme)
        # A direction that no image reached still needs some weight to be told from another.
        reached = sampling.column_moment(system, entry.scheme, sampling.last_tap(layer))
        factors = decompose(matrix, entry.rank, reached)
        for parameter, value in zip((module.U, module.S, module.V), factors, strict=True):
            parameter.copy_(value)
        solution = module.unflatten_matrix(factors.matrix()).flatten(1)
    else:
        module.weight.copy_(solution.reshape(module.weight.shape))
    if layer.bias is not None:
        module.bias.copy_(y_mean - solution @ x_mean)


@dataclass
class _Target:
    """What a dense layer gave: sampled rows, those of its shortcut, the shape of its output."""

    at: Tensor
    size: tuple[int, ...]
    parts: list[Tensor] = field(default_factory=list)
    shortcut: list[Tensor] = field(default_factory=list)
    calls: int = 0

    def rows(self) -> Tensor:
        return torch.cat(self.parts)

    def lost(self, module: nn.Module, shortcut: Tensor) -> Tensor:
        """What the factored network's shortcut lacks, at the same places."""
        return torch.cat(self.shortcut) - sampling.output_rows(module, shortcut, self.at)


@dataclass
class _Seen:
    rows: dict[str, _Target]
    moments: dict[str, tuple[Tensor, Tensor]]

    def correct(self, name: str, norm: str | None, y: Tensor, change: Tensor) -> Tensor:
        """The rows with a change to aim at, by which the batch norm's moments change likewise."""
        new = y + change
        if norm in self.moments:
            mean, variance = self.moments[norm]
            (old_mean, old_variance), (new_mean, new_variance) = (
                channel_moments(channel_sums(rows)) for rows in (y, new)
            )
            ratio = new_variance / old_variance.clamp(min=torch.finfo(torch.float32).tiny)
            self.moments[norm] = mean + new_mean - old_mean, variance * ratio
        return new


def _watch(
    dense: nn.Module,
    flow: Flow,
    layers: list[str],
    norms: list[str],
    images: Tensor,
    settings: Calibration,
) -> _Seen:
    """Run the dense model; keep sampled outputs of layers, and input moments of batch norms."""
    rows: dict[str, _Target] = {}
    sums: dict[str, Tensor] = {}
    pending: dict[str, Tensor] = {}
    start = 0

    def output(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            if name not in rows:
                places = sampling.places(module, y, len(batch))
                at = sampling.positions(name, len(images), places, settings.positions)
                size = () if sampling.is_linear(module) else tuple(y.shape[2:])
                rows[name] = _Target(at.to(y.device), size)
            target = rows[name]
            at = target.at[start : start + len(batch)]
            target.parts.append(sampling.output_rows(module, y, at))
            target.calls += start == 0
            residual = flow.residuals.get(name)
            around = None if residual is None else pending.pop(residual.shortcut, None)
            if around is not None and around.shape == y.shape:
                target.shortcut.append(sampling.output_rows(module, around, at))

        return hook

    def norm(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            sums[name] = sums.get(name, 0) + channel_sums(inputs[0])

        return hook

    handles = [
        dense.get_submodule(name).register_forward_hook(make(name))
        for make, names in ((output, layers), (norm, norms))
        for name in names
    ]
    keep = {r.shortcut: partial(pending.__setitem__, r.shortcut) for r in flow.residuals.values()}
    try:
        with inference(dense):
            for start in range(0, len(images), BATCH):
                batch = images[start : start + BATCH]
                flow.run(dense, batch, keep)
    finally:
        for handle in handles:
            handle.remove()
    return _Seen(rows, {name: channel_moments(found) for name, found in sums.items()})


def _solvable(dense: nn.Module, plan: RankPlan) -> dict[str, LayerPlan]:
    """The layers that a regression can be solved for: each weight once, dense until now."""
    tied = {entry.tied_to for entry in plan.layers}
    found = {}
    for entry in plan.layers:
        layer = dense.get_submodule(entry.name)
        if entry.tied_to is not None or entry.name in tied or not entry.full_rank:
            continue
        if not sampling.can_sample(layer) or isinstance(layer, Factored):
            continue
        if layer.weight[0].numel() <= WIDEST:
            found[entry.name] = entry
    return found


def _gain(norm: nn.Module) -> Tensor:
    """What a batch norm multiplies each channel by, (C,) float64, kept away from 0."""
    gain = batch_norm_gain(norm)
    least = 1e-2 * gain.abs().mean()
    return torch.where(gain < 0, -1.0, 1.0) * gain.abs().clamp(min=least)


def _batch_norms(model: nn.Module) -> list[str]:
    """The batch norms that have running statistics to match and a scale to match them by."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.running_var is not None and module.affine
    ]
