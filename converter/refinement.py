"""Refinement: descend on the difference between the features of the factored and dense networks.

Feature distillation without labels (after FitNets, Romero et al., arXiv 1412.6550): on the
calibration images each unit of the factored network, such as a residual block, should give what the
dense network's gives, channel by channel in units of the dense one's variance; the sum of these
errors is minimised through the whole network, by Adam with a cosine rate. Batch norms keep their
running statistics. The result is kept only where it is closer than the start on the images as they
are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from converter.calibration import Calibration, Progress, batch_size, check_images
from converter.cost import inference
from converter.decompose import decompose
from converter.errors import StiefelError
from converter.factors import Factored, FactoredConv1d, factored_layers

UNIT_LAYERS = 6  # the most layers that are compared as one
_WEIGHTY = (Factored, nn.Linear, nn.modules.conv._ConvNd)
_WARM_UP = 10
_LEAST_VARIANCE = 1e-4  # of the mean over channels: a channel that never moves has no scale


def refine(
    dense: nn.Module,
    small: nn.Module,
    images: Tensor,
    settings: Calibration,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """Refine `small` in place.

    Holds what one training step on `settings.refine_batch` images holds, and a copy of `small`.

    Args:
        dense: the prepared dense model; it is only run.
        small: its factored copy, float32 or wider, on the same device. Everything that belongs to
            a unit is refined: factors, biases, scales.
        images: (N, C, H, W), normalised, on that device.
        settings: how many steps, and how fast.
        progress: called with ("refine", steps done, steps).

    Returns:
        The mean error of a unit over all images, relative to its variance, before and after.

    Raises:
        StiefelError: an image is not finite.
    """
    check_images(images)
    names = find_units(small)
    if not names or not settings.refine_steps:
        return 0.0, 0.0
    with _Watch(dense, names) as wanted, _Watch(small, names) as given:
        scales = _scales(dense, wanted, images)
        if not scales:  # units that the model never calls, or whose output never varies
            return 0.0, 0.0

        def error(x: Tensor) -> Tensor:
            if x.ndim == 4:  # a quarter faster on CPUs
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                dense(x)
            small(x)
            return sum(
                _error(given.values[name], wanted.values[name], scale)
                for name, scale in scales.items()
            ) / len(scales)

        def mean_error() -> float:
            with torch.no_grad():
                parts = [float(error(x)) * len(x) for x in images.split(batch_size(images))]
            return sum(parts) / len(images)

        with inference(dense), inference(small), torch.enable_grad():
            before, state = mean_error(), copy.deepcopy(small.state_dict())
            with _split_factors(small), _trainable(small, names) as parameters:
                _descend(parameters, error, images, settings, progress)
            after = mean_error()
    if not after < before:
        small.load_state_dict(state)
        after = before
    return before, after


def find_units(model: nn.Module, most: int = UNIT_LAYERS) -> list[str]:
    """The largest modules inside a model that hold 1 to `most` layers with a weight matrix.

    A residual block, as a rule; where a model lists its layers one after another, each layer.
    """
    names: list[str] = []

    def walk(name: str, module: nn.Module) -> None:
        count = sum(isinstance(part, _WEIGHTY) for part in module.modules())
        if name and 1 <= count <= most:
            names.append(name)
        elif count:
            for child_name, child in module.named_children():
                walk(f"{name}.{child_name}" if name else child_name, child)

    walk("", model)
    return names


def _descend(
    parameters: list[nn.Parameter],
    error: Callable[[Tensor], Tensor],
    images: Tensor,
    settings: Calibration,
    progress: Progress | None,
) -> None:
    steps = settings.refine_steps
    tiny = torch.finfo(torch.float32).tiny
    sizes = [max(float(p.detach().square().mean().sqrt()), tiny) for p in parameters]
    groups = [
        {"params": [parameter], "lr": settings.refine_lr * size}
        for parameter, size in zip(parameters, sizes, strict=True)
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        if progress:
            progress("refine", step, steps)
        chosen = torch.randint(len(images), (settings.refine_batch,), generator=generator)
        mirrored = torch.rand(settings.refine_batch, generator=generator) < 0.5
        x = images[chosen.to(images.device)]
        if settings.refine_flip and x.ndim == 4:
            x = torch.where(mirrored.to(x.device).view(-1, 1, 1, 1), x.flip(-1), x)
        optimizer.zero_grad()
        error(x).backward()
        optimizer.step()
        schedule.step()


def _error(given: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    return ((given - wanted).square() * scale).mean()


class _Watch:
    """While entered, `values` holds the last output of each named module that is a tensor."""

    def __init__(self, model: nn.Module, names: list[str]):
        self.model, self.names = model, names
        self.values: dict[str, Tensor] = {}

    def __enter__(self) -> _Watch:
        self.handles = [
            self.model.get_submodule(name).register_forward_hook(self._keep(name))
            for name in self.names
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> object:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(first, Tensor) and first.is_floating_point():
                # A later layer may work in place on the output itself.
                self.values[name] = first.clone()

        return hook


def _scales(dense: nn.Module, wanted: _Watch, images: Tensor) -> dict[str, Tensor]:
    """Per unit 1 / variance of each channel of the dense network's output, to multiply it by."""
    sums: dict[str, Tensor] = {}
    with inference(dense):
        for x in images.split(batch_size(images)):
            dense(x)
            for name, value in wanted.values.items():
                channels = _channel_axis(dense.get_submodule(name), value)
                axes = [axis for axis in range(value.ndim) if axis != channels]
                count = value.numel() / value.shape[channels]
                wide = value.double()
                part = [wide.sum(axes, True), wide.square().sum(axes, True)]
                part.append(torch.full_like(part[0], count))
                sums[name] = sums.get(name, 0) + torch.stack(part)
    scales = {}
    for name, (total, squares, count) in sums.items():
        variance = squares / count - (total / count).square()
        least = _LEAST_VARIANCE * variance.mean()
        if least > 0:
            scales[name] = (1 / variance.clamp(min=least)).to(images.dtype)
    return scales


def _channel_axis(unit: nn.Module, value: Tensor) -> int:
    """Maps and what a 1-D convolution gives have their channels second, tokens and vectors last."""
    last = [m for m in unit.modules() if isinstance(m, _WEIGHTY)][-1:]
    sequence = value.ndim == 3 and any(isinstance(m, nn.Conv1d | FactoredConv1d) for m in last)
    return 1 if value.ndim == 4 or sequence else value.ndim - 1


@contextmanager
def _split_factors(model: nn.Module) -> Iterator[None]:
    """Spread S evenly over U and V, so that steps on both weigh alike; a proper SVD afterwards."""
    layers = {id(layer.S): layer for layer in factored_layers(model).values()}
    with torch.no_grad():
        for layer in layers.values():
            root = layer.S.clamp(min=0).sqrt().unsqueeze(-2)
            layer.U.mul_(root)
            layer.V.mul_(root)
            layer.S.fill_(1)
    yield
    with torch.no_grad():
        for name, layer in factored_layers(model).items():
            if layers.pop(id(layer.S), None) is None:
                continue  # tied to one that is done
            try:
                factors = decompose(layer.factors(), layer.rank)
            except StiefelError as error:
                raise StiefelError(f"{name}, while refining: {error}; try a lower rate") from None
            for parameter, value in zip((layer.U, layer.S, layer.V), factors, strict=True):
                parameter.copy_(value)


@contextmanager
def _trainable(model: nn.Module, names: list[str]) -> Iterator[list[nn.Parameter]]:
    """The units' parameters but S, with gradients on; frozen ones are frozen again afterwards."""
    spread = {id(layer.S) for layer in factored_layers(model).values()}
    found = {id(p): p for name in names for p in model.get_submodule(name).parameters()}
    asked = {key: p.requires_grad for key, p in found.items()}
    for key, parameter in found.items():
        parameter.requires_grad_(key not in spread and parameter.is_floating_point())
    try:
        yield [p for p in found.values() if p.requires_grad]
    finally:
        for key, parameter in found.items():
            parameter.requires_grad_(asked[key])
            parameter.grad = None
