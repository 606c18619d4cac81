"""Calibration: a few hundred unlabelled images that tell which directions of a weight matter.

Three steps, each of which can be switched off. *Whitened* truncation cuts in the norm of the
layer's own inputs, ‖(W − W_r) C^{1/2}‖ with C = E[x xᵀ]. *Sequential* reconstruction goes through
the network in order and regresses the dense layer's outputs on the inputs that the layers factored
before it produce (after Zhang et al., arXiv 1505.06798; linear here, with a ridge towards W), then
truncates. *Batch-norm matching* gives each batch norm's output the mean and variance that the dense
network's has on the same images.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from converter import sampling, schemes
from converter.cost import inference
from converter.decompose import decompose
from converter.errors import StiefelError
from converter.factors import Factored
from converter.layers import Layer
from converter.ranks import LayerPlan, RankPlan
from converter.settings import Settings

Progress = Callable[[str, int, int], None]
Moments = Mapping[tuple[str, str | None], Tensor]

# Above this width a second moment would take gigabytes: such layers are cut by their weight alone.
WIDEST = 8192
_BATCH = 64


class Calibration(Settings):
    """Which calibration steps run, and how."""

    whitened: bool = Field(True, description="truncate in the norm of each layer's own inputs")
    sequential: bool = Field(
        True, description="regress dense outputs on what the layers factored before produce"
    )
    match_batch_norm: bool = Field(
        True, description="give batch norms' outputs the dense network's mean and variance"
    )
    positions: int = Field(64, ge=1, description="sampled positions of each image and layer")
    ridge: float = Field(
        1e-3, gt=0, description="pull of the regression towards the dense weight, relative"
    )


def second_moments(
    model: nn.Module,
    images: Tensor,
    layers: Iterable[Layer],
    settings: Calibration,
    device: torch.device,
    progress: Progress | None = None,
) -> Moments:
    """E[x xᵀ] of each layer's inputs as its scheme's matrix sees them, by (name, scheme).

    Uncentred, summed in float64, image batch by image batch: what is held is one n×n matrix a layer
    and scheme. Grouped convolutions, layers wider than `WIDEST` and layers that the model never
    calls (it may read their weight instead) have none.

    Args:
        model: a prepared model; it is only run.
        images: (N, C, H, W) float32, normalised.
        layers: of that model.
        settings: how many positions to sample.
        device: where to run; the model must lie there.
        progress: called with ("calibrate", images done, images).
    """
    _check(images)
    sums: dict[tuple[str, str | None], Tensor] = {}
    counts: dict[tuple[str, str | None], int] = {}

    def register(layer: Layer):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            at = sampling.positions(
                layer.name, now.size, sampling.places(module, output, now.size), settings.positions
            )
            rows = sampling.input_rows(module, inputs[0], tuple(output.shape[2:]), at)
            for scheme in layer.schemes:
                seen = sampling.column_rows(rows, scheme, sampling.last_tap(module))
                if seen.shape[1] <= WIDEST:
                    key = (layer.name, scheme)
                    sums[key] = sums.get(key, 0) + (seen.mT @ seen).double()
                    counts[key] = counts.get(key, 0) + len(seen)

        return layer.module.register_forward_hook(hook)

    now = _Batch()
    handles = [
        register(layer)
        for layer in layers
        if layer.refusal is None and sampling.can_sample(layer.module)
    ]
    try:
        with inference(model):
            for start in range(0, len(images), _BATCH):
                if progress:
                    progress("calibrate", start, len(images))
                batch = images[start : start + _BATCH].to(device)
                now.size = len(batch)
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {key: (total / counts[key]).cpu() for key, total in sums.items()}


@torch.no_grad()
def reconstruct(
    dense: nn.Module,
    small: nn.Module,
    plan: RankPlan,
    images: Tensor,
    settings: Calibration,
    progress: Progress | None = None,
) -> None:
    """Fit the factored layers and batch norms of `small` to what `dense` does on the images.

    In one pass through each network: as the images reach a factored layer of `small`, all before it
    is final, so the layer is solved for there and then, and the pass goes on with the result. That
    holds the activations of all images at one layer, besides P sampled output rows for each layer.

    Args:
        dense: the prepared dense model.
        small: its factored copy, changed in place; both lie on the images' device.
        plan: what was factored, and how.
        images: (N, C, H, W) float32, normalised.
        settings: which steps run.
        progress: called with (layer, layers done, layers).
    """
    _check(images)
    entries = {entry.name: entry for entry in plan.factored} if settings.sequential else {}
    tied = {entry.tied_to for entry in plan.layers}
    entries = {
        name: entry
        for name, entry in entries.items()
        if entry.tied_to is None
        and name not in tied
        and sampling.can_sample(dense.get_submodule(name))
        and not isinstance(dense.get_submodule(name), Factored)
        and dense.get_submodule(name).weight[0].numel() <= WIDEST
    }
    norms = _batch_norms(dense) if settings.match_batch_norm else []
    seen = _watch(dense, list(entries), norms, images, settings)
    done = 0

    def solve(name: str) -> Callable:
        def hook(module: Factored, inputs: tuple[Tensor, ...]) -> None:
            nonlocal done
            if progress:
                progress(name, done, len(entries))
            done += 1
            target = seen.rows.get(name)
            if target is None or target.calls > 1:
                return
            at = sampling.positions(name, len(images), target.places, settings.positions)
            rows = sampling.input_rows(module, inputs[0], target.size, at)
            layer = dense.get_submodule(name)
            refit(module, layer, entries[name], rows, target.rows(), settings.ridge)

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
    try:
        with inference(small):
            small(images)
    finally:
        for handle in handles:
            handle.remove()


def refit(
    module: Factored, layer: nn.Module, entry: LayerPlan, x: Tensor, y: Tensor, ridge: float
) -> None:
    """Set the factors to the truncated ridge regression of y (R, N) on x (R, C·K); in place.

    K* = argmin ‖y − K x‖² + ρ ‖K − W‖², then the best approximation of K* of the entry's rank in
    the norm of x. A layer with a bias is fitted about the means, and its bias takes them up.
    """
    x, y = x.double(), y.double()
    weight = layer.weight.double().flatten(1)
    centred = layer.bias is not None
    x_mean, y_mean = x.mean(0), y.mean(0)
    if centred:
        x, y = x - x_mean, y - y_mean
    moment = x.mT @ x / len(x)
    cross = y.mT @ x / len(x)
    rho = ridge * moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    system = moment + rho * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    solution = torch.linalg.solve(system, (cross + rho * weight).mT).mT
    matrix = solution
    if entry.scheme is not None:
        matrix = schemes.to_matrix(solution.reshape(layer.weight.shape), entry.scheme)
    # A direction that no image reached still needs some weight to be told from another.
    seen = sampling.column_moment(system, entry.scheme, sampling.last_tap(layer))
    factors = decompose(matrix, entry.rank, seen)
    for parameter, value in zip((module.U, module.S, module.V), factors, strict=True):
        parameter.copy_(value)
    if centred:
        cut = factors.matrix()
        if entry.scheme is not None:
            cut = schemes.from_matrix(cut, entry.scheme, layer.weight.shape).flatten(1)
        module.bias.copy_(y_mean - cut @ x_mean)


def match_batch_norm(
    module: nn.Module, dense: nn.Module, x: Tensor, mean: Tensor, variance: Tensor
) -> None:
    """Make batch norm map its input to the mean and variance of the dense one's output; in place.

    Args:
        module: the factored network's batch norm; its running statistics become those of x.
        dense: the dense network's.
        x: (N, C, ...) the input of `module`.
        mean: (C,) of the dense one's input on the same images.
        variance: (C,) likewise, biased.
    """
    own_mean, own_variance = channel_moments(channel_sums(x))
    gain = dense.weight.double() / (dense.running_var.double() + dense.eps).sqrt()
    # A channel that is dead in the factored network can't be brought back by scaling.
    spread = ((variance + module.eps) / (own_variance + module.eps)).sqrt()
    module.bias.copy_(dense.bias.double() + (mean - dense.running_mean.double()) * gain)
    module.running_mean.copy_(own_mean)
    module.running_var.copy_(own_variance)
    module.weight.copy_(gain * spread * (own_variance + module.eps).sqrt())


def channel_sums(x: Tensor) -> Tensor:
    """Count, sum and sum of squares of each channel of x (N, C, ...): (3, C) float64."""
    flat = x.transpose(0, 1).flatten(1).double()
    return torch.stack(
        [torch.full_like(flat[:, 0], flat.shape[1]), flat.sum(1), flat.square().sum(1)]
    )


def channel_moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) from `channel_sums` (3, C), perhaps added up."""
    count, total, squares = sums
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)


@dataclass
class _Batch:
    size: int = 0


@dataclass
class _Target:
    """What a dense layer gave: sampled rows, and the shape of its output."""

    parts: list[Tensor]
    places: int
    size: tuple[int, ...]
    calls: int = 0

    def rows(self) -> Tensor:
        return torch.cat(self.parts)


@dataclass
class _Seen:
    rows: dict[str, _Target]
    moments: dict[str, tuple[Tensor, Tensor]]


def _watch(
    dense: nn.Module, layers: list[str], norms: list[str], images: Tensor, settings: Calibration
) -> _Seen:
    """Run the dense model; keep sampled outputs of layers, and input moments of batch norms."""
    rows: dict[str, _Target] = {}
    sums: dict[str, Tensor] = {}
    start = 0

    def output(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            found = sampling.places(module, y, len(batch))
            at = sampling.positions(name, len(images), found, settings.positions)
            size = () if sampling.is_linear(module) else tuple(y.shape[2:])
            target = rows.setdefault(name, _Target([], found, size))
            target.parts.append(sampling.output_rows(module, y, at[start : start + len(batch)]))
            target.calls += start == 0

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
    try:
        with inference(dense):
            for start in range(0, len(images), _BATCH):
                batch = images[start : start + _BATCH]
                dense(batch)
    finally:
        for handle in handles:
            handle.remove()
    return _Seen(rows, {name: channel_moments(found) for name, found in sums.items()})


def _batch_norms(model: nn.Module) -> list[str]:
    """The batch norms that have running statistics to match and a scale to match them by."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.running_var is not None
        and module.affine
    ]


def _check(images: Tensor) -> None:
    if images.ndim < 2 or len(images) == 0:
        raise StiefelError(f"calibration needs a batch of images, not {tuple(images.shape)}")
    if not images.isfinite().all():
        raise StiefelError("a calibration image is not finite")
