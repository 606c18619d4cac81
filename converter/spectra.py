"""Spectra and factors of a model's layers, each found once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from converter.calibration import Calibration, Progress, check_images, check_output
from converter.decompose import Factors, Spectrum, spectrum
from converter.errors import StiefelError
from converter.layers import Layer
from converter.moments import Key, Moment, Moments
from converter.rank_plan import LayerPlan, RankPlan

NO_MOMENTS: Mapping[Key, Moment] = {}


class Decomposer:
    """Finds spectra, and keeps them for `convert`."""

    def __init__(self, device: torch.device, moments: Moments | Mapping[Key, Moment]):
        self.device, self.moments = device, moments
        self.known: dict[Key, Spectrum] = {}

    def __call__(self, layer: Layer, scheme: str | None, rank: int | None = None) -> Spectrum:
        """At least the first `rank` directions of one layer; all of them by default."""
        key = (layer.name, scheme)
        known = self.known.get(key)
        if known is None or known.values.shape[-1] < (rank or layer.highest_rank(scheme)):
            moment = self.moments.get(key)
            known = self.known[key] = layer_spectrum(layer, scheme, rank, self.device, moment)
        return known


def layer_spectrum(
    layer: Layer,
    scheme: str | None,
    rank: int | None,
    device: torch.device,
    moment: Moment | None = None,
) -> Spectrum:
    """The spectrum of one layer, on `device`, whitened where a moment is given."""
    by = {}
    if moment is not None:
        by["output_moment" if moment.of_outputs else "second_moment"] = moment.matrix.to(device)
    try:
        return spectrum(layer.matrix(scheme).to(device), rank, **by)
    except StiefelError as error:
        raise StiefelError(f"{layer.name}: {error}") from None


def calibrated(
    model: nn.Module,
    images: Tensor | None,
    layers: Sequence[Layer],
    settings: Calibration | None,
    device: torch.device,
    progress: Progress | None,
) -> Moments | Mapping[Key, Moment]:
    """The layers' second moments; none without images or where whitening is off.

    Raises:
        StiefelError: an image is not finite, or what the model gives for it.
    """
    if images is None:
        return NO_MOMENTS
    check_images(images)
    check_output(model, images)
    settings = settings or Calibration()
    if not settings.whitened:
        return NO_MOMENTS
    return Moments(model, images, layers, settings, device, progress)


def layer_factors(
    layer: Layer,
    entry: LayerPlan,
    plan: RankPlan,
    device: torch.device,
    moments: Moments | Mapping[Key, Moment],
) -> tuple[Factors, float]:
    """The planned factors of one layer, on the layer's own device, and their relative error.

    Taken from the spectrum found while planning if that is of the very same weight, and whitened
    where moments are to be had; else found anew on `device`.
    """
    matrix = layer.matrix(entry.scheme)
    known = plan._spectra.get((entry.name, entry.scheme))
    blind = bool(moments) and known is not None and not known.whitened
    if known is None or blind or not known.reaches(matrix, entry.rank):
        moment = moments.get((entry.name, entry.scheme))
        known = layer_spectrum(layer, entry.scheme, entry.rank, device, moment)
    factors = known.to(device).factors(matrix.to(device), entry.rank)
    return factors.to(layer.device), known.error(entry.rank)
