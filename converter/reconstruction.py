"""Sequential reconstruction: each layer in turn is solved for, on what those before it produce."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from converter import sampling, schemes
from converter.calibration import (
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
from converter.flow import BatchNorm, Flow, Residual, trace
from converter.lockstep import Meeting, Station, stations
from converter.rank_plan import LayerPlan, RankPlan

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

    Both networks run side by side (`converter.lockstep`, in bounded memory): when the images reach
    a layer of `small`, all before it is final, so the layer is solved for there and then, and the
    run goes on with the result.

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
    if not entries and not norms:
        return
    work = _Work(dense, small, trace(dense, entries, images), settings, len(images))
    done = 0
    with inference(dense), inference(small):
        for station in stations(dense, small, work.flow.graph, [*entries, *norms], images):
            if station.name in entries:
                if progress:
                    progress(station.name, done, len(entries))
                work.solve(station, entries[station.name])
                done += 1
            else:
                work.match(station)


@dataclass
class _Work:
    """What is known while the networks run."""

    dense: nn.Module
    small: nn.Module
    flow: Flow
    settings: Calibration
    images: int
    # How the moments that a batch norm is to have differ from the dense one's: by its name.
    moved: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def solve(self, station: Station, entry: LayerPlan) -> None:
        """Regress the layer on what it is given, and put the result in place."""
        name, settings = station.name, self.settings
        layer, module = self.dense.get_submodule(name), self.small.get_submodule(name)
        residual, at = self.flow.residuals.get(name), None
        sums, before, after = Regression(), 0, 0
        for meeting in station.meetings():
            y = meeting.output
            if at is None:
                # Where few of the images have come yet, more is to be seen of each.
                places = sampling.places(layer, y, len(meeting.given))
                wanted = -(-settings.positions * self.images // station.images)
                at = sampling.positions(name, station.images, places, wanted)
            here = at[meeting.start : meeting.start + len(meeting.given)]
            size = () if sampling.is_linear(layer) else tuple(y.shape[2:])
            rows = sampling.output_rows(layer, y, here)
            change = self._lost(meeting, residual, layer, here)
            if change is not None:
                before = before + channel_sums(rows)
                rows = rows + change
                after = after + channel_sums(rows)
            sums.add(sampling.input_rows(module, meeting.given, size, here), rows)
        if residual is not None and residual.norm is not None and torch.is_tensor(before):
            self._move(residual.norm, before, after)
        centred = layer.bias is not None or (name in self.flow.normed and settings.match_batch_norm)
        refit(module, layer, entry, sums, settings.ridge, centred)

    def match(self, station: Station) -> None:
        """Give the batch norm the moments of the dense one."""
        norm = self.dense.get_submodule(station.name)
        theirs, mine = 0, 0
        for meeting in station.meetings():
            theirs = theirs + channel_sums(meeting.input)
            mine = mine + channel_sums(meeting.given)
        mean, variance = channel_moments(theirs)
        if station.name in self.moved:
            shift, ratio = self.moved[station.name]
            mean, variance = mean + shift, variance * ratio
        match_batch_norm(self.small.get_submodule(station.name), norm, mine, mean, variance)

    def _lost(
        self, meeting: Meeting, residual: Residual | None, layer: nn.Module, at: Tensor
    ) -> Tensor | None:
        """What the branch's last layer is to make up for of what its shortcut lacks, as rows."""
        if residual is None:
            return None
        whole, left = meeting.dense[residual.shortcut], meeting.small[residual.shortcut]
        if whole.shape != meeting.output.shape:
            return None
        norm = residual.norm
        gain = 1.0 if norm is None else _gain(self.dense.get_submodule(norm))
        lost = sampling.output_rows(layer, whole, at) - sampling.output_rows(layer, left, at)
        return self.settings.residual * lost / gain

    def _move(self, norm: str, before: Tensor, after: Tensor) -> None:
        """The batch norm's moments are to change as those of the rows before it were made to."""
        (old_mean, old_variance), (new_mean, new_variance) = map(channel_moments, (before, after))
        ratio = new_variance / old_variance.clamp(min=torch.finfo(torch.float32).tiny)
        self.moved[norm] = new_mean - old_mean, ratio


class Regression:
    """Sums over rows x (R, n) and y (R, m) that a regression of y on x needs, in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.x = self.y = self.xx = self.yx = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows that belong together."""
        self.rows += len(x)
        for some, given in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
            some, given = some.double(), given.double()
            self.x, self.y = self.x + some.sum(0), self.y + given.sum(0)
            self.xx, self.yx = self.xx + some.mT @ some, self.yx + given.mT @ some

    def moments(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """E[x xᵀ] (n, n) and E[y xᵀ] (m, n), about the means if `centred`."""
        xx, yx = self.xx / self.rows, self.yx / self.rows
        if centred:
            mean = self.x / self.rows
            xx, yx = xx - mean.outer(mean), yx - (self.y / self.rows).outer(mean)
        return xx, yx


def refit(
    module: nn.Module,
    layer: nn.Module,
    entry: LayerPlan,
    sums: Regression,
    ridge: float,
    centred: bool,
) -> None:
    """Set a layer to the ridge regression of y (R, N) on x (R, C·K), truncated; in place.

    K* = argmin ‖y − K x‖² + ρ ‖K − W‖², then, if `module` is factored, the best approximation of
    K* of the entry's rank in the norm of x. Where centred, both are taken about their means, which
    the bias takes up if there is one.
    """
    weight = layer.weight.double().flatten(1)
    moment, cross = sums.moments(centred=centred)
    # Few rows for many unknowns say less than the dense weight does.
    ridge = max(ridge, 0.1 * len(moment) / sums.rows)
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
        module.bias.copy_((sums.y - solution @ sums.x) / sums.rows)


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
