"""Second moments of what layers see on real images, gathered a few layers at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from converter import sampling
from converter.calibration import (
    WIDEST,
    Calibration,
    Progress,
    batch_size,
    fit_to,
)
from converter.cost import inference
from converter.layers import Layer

HELD = 2**30  # bytes of moments that are held at once, unless one layer's alone are more

Key = tuple[str, str | None]  # a layer's name and a scheme


@dataclass(frozen=True)
class Moment:
    """An uncentred second moment, float64.

    Attributes:
        matrix: E[x xᵀ] (n, n) of what the scheme's matrix W is multiplied with, or E[(W x)(W x)ᵀ]
            (m, m) of the product.
        of_outputs: whether it is the latter.
    """

    matrix: Tensor
    of_outputs: bool = False


class Moments:
    """The layers' second moments, found when they are asked for.

    They are asked for in the layers' order, as a rule. So one pass of the images finds those of the
    layer and of as many after it as `HELD` allows, and what the pass before found is dropped.

    Args:
        model: a prepared model; it is only run.
        images: (N, C, H, W), normalised.
        layers: of that model.
        settings: how many positions to sample.
        device: where to run.
        progress: called with ("calibrate", images done, images) in each pass.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        layers: Sequence[Layer],
        settings: Calibration,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._images, self._layers = model, images, layers
        self._settings, self._device, self._progress = settings, device, progress
        self._held: Mapping[Key, Moment] = {}
        self._seen: set[str] = set()

    def get(self, key: Key) -> Moment | None:
        """The moment of a layer under a scheme, if it has one; see `second_moments`."""
        name = key[0]
        if name not in self._seen and any(layer.name == name for layer in self._layers):
            group = list(self._group(name))
            self._held = {}  # before the next are made
            home = next(self._model.parameters()).device
            self._model.to(self._device)
            try:
                rest = (self._settings, self._device, self._progress)
                self._held = second_moments(self._model, self._images, group, *rest)
            finally:
                self._model.to(home)
            self._seen = {layer.name for layer in group}
        return self._held.get(key)

    def _group(self, name: str) -> Iterator[Layer]:
        """The layer and as many after it as fit."""
        names = [layer.name for layer in self._layers]
        total = 0
        for layer in self._layers[names.index(name) :]:
            sides = [_side(layer, scheme) for scheme in layer.schemes if layer.refusal is None]
            total += sum(8 * side**2 for side in sides if side is not None)
            if layer.name != name and total > HELD:
                return
            yield layer


def second_moments(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[Layer],
    settings: Calibration,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[Key, Moment]:
    """The moments of some layers by (name, scheme), as each scheme's matrix sees its inputs.

    Summed in float64, image batch by image batch: what is held is one matrix a layer and scheme, of
    the outputs where the inputs are wider than `WIDEST`. Grouped convolutions, layers both of whose
    sides are wider and layers that the model never calls (it may read their weight instead) have
    none.

    Args: see `Moments`; the model must lie on `device`.
    """
    sums: dict[Key, Tensor] = {}
    counts: dict[Key, int] = {}
    now = 0  # images of the batch in hand

    def register(layer: Layer):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            places = sampling.places(module, output, now)
            at = sampling.positions(layer.name, now, places, settings.positions)
            rows = sampling.input_rows(module, inputs[0], tuple(output.shape[2:]), at)
            for scheme in layer.schemes:
                if _side(layer, scheme) is None:
                    continue
                seen = sampling.column_rows(rows, scheme, sampling.last_tap(module))
                if _of_outputs(layer, scheme):
                    seen = (layer.matrix(scheme).to(seen.dtype) @ seen.mT).mT
                key = (layer.name, scheme)
                sums[key] = sums.get(key, 0) + (seen.mT @ seen).double()
                counts[key] = counts.get(key, 0) + len(seen)

        return layer.module.register_forward_hook(hook)

    handles = [
        register(layer)
        for layer in layers
        if layer.refusal is None and sampling.can_sample(layer.module)
    ]
    size = batch_size(images)
    try:
        with inference(model):
            for start in range(0, len(images), size):
                if progress:
                    progress("calibrate", start, len(images))
                batch = fit_to(images[start : start + size], model, device)
                now = len(batch)
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    owners = {layer.name: layer for layer in layers}
    return {
        key: Moment((total / counts[key]).cpu(), _of_outputs(owners[key[0]], key[1]))
        for key, total in sums.items()
    }


def _of_outputs(layer: Layer, scheme: str | None) -> bool:
    return layer.shape(scheme)[1] > WIDEST


def _side(layer: Layer, scheme: str | None) -> int | None:
    """Rows of a layer's moment; None where it would be too large."""
    side = layer.shape(scheme)[0 if _of_outputs(layer, scheme) else 1]
    return side if side <= WIDEST else None
