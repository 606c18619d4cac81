"""Calibration: a few hundred unlabelled images that tell which directions of a weight matter.

Four steps, each of which can be switched off. *Whitened* truncation cuts in the norm of the
layer's own inputs, ‖(W − W_r) C^{1/2}‖ with C = E[x xᵀ]. *Sequential* reconstruction
(`converter.reconstruction`) goes through
the network in order and regresses the dense layer's outputs on the inputs that the layers factored
before it produce (after Zhang et al., arXiv 1505.06798; linear here, with a ridge towards W), then
truncates; the last layer of a residual branch also makes up for what its shortcut has lost.
*Batch-norm matching* gives each batch norm's output the mean and variance that the dense network's
has on the same images. *Refinement* (`converter.refinement`) then descends on the difference
between the features of both networks.
"""

from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from converter.cost import inference
from converter.errors import StiefelError
from converter.settings import Settings

Progress = Callable[[str, int, int], None]

WIDEST = 8192  # above this width a matrix of second moments would take gigabytes
BATCH, PIXELS = 64, 2**20  # images, and pixels of theirs, that run at once
_TRIED = 8  # images that tell whether a model's output is finite
_HALF = {torch.float16, torch.bfloat16}


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
    sensitivity: float = Field(
        0.5,
        ge=0,
        le=1,
        description="power by which budgets spare layers that the output is sensitive to; 0: none",
    )
    residual: float = Field(
        0.5,
        ge=0,
        le=1,
        description="how much of its shortcut's error the last layer of a residual branch corrects",
    )
    refine_steps: int = Field(
        200, ge=0, description="steps of feature distillation on the same images; 0 for none"
    )
    refine_lr: float = Field(
        0.03, gt=0, description="their peak rate, relative to each tensor's root mean square"
    )
    refine_batch: int = Field(32, ge=1, description="images of each refinement step")
    refine_flip: bool = Field(
        True, description="refine on mirrored images too: each is mirrored half of the time"
    )


def batch_size(images: Tensor) -> int:
    """How many of the images (N, C, H, W) run at once: fewer of large ones."""
    return max(1, min(BATCH, PIXELS // images[0, :1].numel()))


def match_batch_norm(
    module: nn.Module, dense: nn.Module, sums: Tensor, mean: Tensor, variance: Tensor
) -> None:
    """Make batch norm map its input to the mean and variance of the dense one's output; in place.

    Args:
        module: the factored network's batch norm; its running statistics become its input's.
        dense: the dense network's.
        sums: (3, C), the `channel_sums` of the input of `module`.
        mean: (C,) that the dense one's input should have on the same images.
        variance: (C,) likewise, biased.
    """
    own_mean, own_variance = channel_moments(sums)
    gain = batch_norm_gain(dense)
    # A channel that is dead in the factored network can't be brought back by scaling.
    spread = ((variance + module.eps) / (own_variance + module.eps)).sqrt()
    module.bias.copy_(dense.bias.double() + (mean - dense.running_mean.double()) * gain)
    module.running_mean.copy_(own_mean)
    module.running_var.copy_(own_variance)
    module.weight.copy_(gain * spread * (own_variance + module.eps).sqrt())


def batch_norm_gain(module: nn.Module) -> Tensor:
    """What a batch norm with running statistics multiplies each channel by: (C,) float64."""
    scale = 1.0 if module.weight is None else module.weight.double()
    return scale / (module.running_var.double() + module.eps).sqrt()


def channel_sums(x: Tensor) -> Tensor:
    """Count, sum and sum of squares of each channel of x (N, C, ...): (3, C) float64."""
    total = torch.zeros(3, x.shape[1], dtype=torch.float64, device=x.device)
    for some in x.split(BATCH):
        flat = some.transpose(0, 1).flatten(1).double()
        total[0] += flat.shape[1]
        total[1] += flat.sum(1)
        total[2] += flat.square().sum(1)
    return total


def channel_moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) from `channel_sums` (3, C), perhaps added up."""
    count, total, squares = sums
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)


def widen(model: nn.Module) -> dict[str, torch.dtype]:
    """Take half precision parameters and buffers to float32, in place; says what each was."""
    was = {name: t.dtype for name, t in _tensors(model).items()}
    if _HALF & set(was.values()):
        model.float()
    return was


def narrow(model: nn.Module, was: Mapping[str, torch.dtype]) -> None:
    """Give each tensor of a model, factored or not, the precision that it or its weight had."""
    for name, tensor in _tensors(model).items():
        owner = name.rpartition(".")[0]
        dtype = was.get(name) or was.get(f"{owner}.weight" if owner else "weight", tensor.dtype)
        tensor.data = tensor.data.to(dtype)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if tensor.is_floating_point()}


def fit_to(images: Tensor, model: nn.Module, device: torch.device) -> Tensor:
    """The images on a device, in the precision that the model computes in."""
    dtypes = {tensor.dtype for tensor in _tensors(model).values()}
    return images.to(device, torch.float64 if dtypes == {torch.float64} else torch.float32)


def check_images(images: Tensor) -> None:
    """Refuse what can't calibrate."""
    if images.ndim < 2 or len(images) == 0:
        raise StiefelError(f"calibration needs a batch of images, not {tuple(images.shape)}")
    if not images.isfinite().all():
        raise StiefelError("a calibration image is not finite")


def check_output(model: nn.Module, images: Tensor) -> None:
    """Refuse a model that gives what is not finite; the first of the images (N, C, H, W) tell.

    Raises:
        StiefelError: names the first weight that is not finite, where that is why.
    """
    with inference(model):
        output = model(fit_to(images[:_TRIED], model, next(model.parameters()).device))
    if isinstance(output, Tensor) and not output.isfinite().all():
        broken = [name for name, value in _tensors(model).items() if not value.isfinite().all()]
        reason = f"; {broken[0]} holds NaN or infinity" if broken else ""
        raise StiefelError(f"the model's output on calibration images is not finite{reason}")
