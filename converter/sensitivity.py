"""How much the network's output minds an error in each layer's, from the output's Fisher matrix.

To second order, an error ε in a layer's output changes the predicted distribution by ½ εᵀ F ε
(Kullback–Leibler), F = E[g gᵀ] with g the gradient of the log-probability of a class that is drawn
from the prediction itself: no labels are needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converter.calibration import Calibration, batch_size, fit_to
from converter.cost import inference
from converter.layers import Layer
from converter.sampling import channel_axis

IMAGES = 256  # enough for one figure a layer
_BATCH = 32  # at most


def sensitivities(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[Layer],
    settings: Calibration,
    device: torch.device,
) -> dict[str, float]:
    """What losing the whole output of a layer would do, to the power `settings.sensitivity`.

    Σ over channels of F_cc E[y_c²], positions summed in F and averaged in y; relative to the
    layers' geometric mean. Empty where the model's output is no (N, classes) tensor with a
    gradient; layers that the model doesn't call are absent.
    """
    if not settings.sensitivity or not layers:
        return {}
    home = next(model.parameters()).device
    model.to(device)
    outputs: dict[str, Tensor] = {}
    handles = [layer.module.register_forward_hook(_keep(outputs, layer.name)) for layer in layers]
    axes = {layer.name: channel_axis(layer.module) for layer in layers}
    try:
        with inference(model), torch.enable_grad():
            totals = _totals(model, images[:IMAGES], outputs, axes)
    finally:
        for handle in handles:
            handle.remove()
        model.to(home)
    found = {name: float((f * y).sum()) for name, (f, y) in totals.items()}
    logs = {n: settings.sensitivity * torch.tensor(v).log() for n, v in found.items() if v > 0}
    if not logs:
        return {}
    middle = sum(logs.values()) / len(logs)
    return {name: float((log - middle).exp()) for name, log in logs.items()}


def _totals(
    model: nn.Module, images: Tensor, outputs: dict[str, Tensor], axes: dict[str, int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer Σ over images of (Σ over positions of g², mean over positions of y²), (C,) each."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    totals: dict[str, tuple[Tensor, Tensor]] = {}
    for x in images.split(min(_BATCH, batch_size(images))):
        outputs.clear()
        logits = model(fit_to(x, model, device).requires_grad_())
        if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.requires_grad:
            return {}
        drawn = torch.multinomial(logits.detach().float().softmax(1).cpu(), 1, generator=generator)
        loss = F.cross_entropy(logits, drawn[:, 0].to(device), reduction="sum")
        names = [name for name, y in outputs.items() if y.requires_grad]
        if not names:
            return {}
        gradients = torch.autograd.grad(loss, [outputs[n] for n in names], allow_unused=True)
        for name, g in zip(names, gradients, strict=True):
            if g is None:
                continue
            y, axis = outputs[name].detach(), axes[name]
            places = y.numel() / len(x) / y.shape[axis]
            f, e = totals.get(name, (0, 0))
            totals[name] = f + _by_channel(g, axis), e + _by_channel(y, axis) / places
    return totals


def _keep(outputs: dict[str, Tensor], name: str):
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[name] = output

    return hook


def _by_channel(y: Tensor, axis: int) -> Tensor:
    return y.double().square().transpose(0, axis).flatten(1).sum(1)
