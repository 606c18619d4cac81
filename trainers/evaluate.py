"""How well a model classifies a data set."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from converter.errors import StiefelError
from trainers.device import Precision, autocast, resolve_device
from trainers.image_set import Item, batches, plain
from trainers.looking import in_mode


@dataclass(frozen=True)
class Evaluation:
    """Accuracy (0..1), mean cross-entropy, and the number of images they were measured on."""

    accuracy: float
    loss: float
    images: int

    def require_finite(self, who: str = "the model") -> None:
        """Refuse to go by this where the network has come to naught.

        Raises:
            StiefelError: the loss isn't finite.
        """
        if not math.isfinite(self.loss):
            raise StiefelError(f"{who}'s output isn't finite; no figure would mean much")


def evaluate(
    model: nn.Module,
    dataset: Dataset[Item],
    *,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    precision: Precision = "fp32",
    workers: int | None = None,
    layout: torch.memory_format = torch.contiguous_format,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Measure the model on the data, without augmentation, in eval mode and without gradients.

    Args:
        model: gives logits (N, K); every module's training mode is restored after.
        device: where to run; the model stays there. None: where it is. "auto": CUDA if there.
        precision: bf16 and fp16 run under autocast; the loss is float32 regardless.
        workers: processes that read large images ahead; chosen by the machine if None.
        layout: of the images in memory.
        progress: called with ("evaluate", images done, images in all).

    Raises:
        StiefelError: there are no images, no such device, or labels that the model lacks.
    """
    total = len(dataset)  # type: ignore[arg-type]
    if total == 0:
        raise StiefelError("nothing to evaluate on: the data set is empty")
    dataset = plain(dataset)
    parameter = next(model.parameters(), torch.zeros(0))
    if device is not None:
        model.to(device := resolve_device(device))
    else:
        device = parameter.device
    correct = loss = torch.zeros((), device=device, dtype=torch.float64)
    done = 0
    pin = device.type == "cuda"
    with in_mode(model, False), torch.no_grad(), autocast(device, precision):
        for x, y in batches(dataset, batch_size, workers=workers, pin_memory=pin):
            x = x.to(device, parameter.dtype, non_blocking=True, memory_format=layout)
            logits = _logits(model(x), y)
            y = y.to(device, non_blocking=True)
            loss = loss + F.cross_entropy(logits, y, reduction="sum").double()
            correct = correct + (logits.argmax(1) == y).sum()
            done += len(y)
            if progress:
                progress("evaluate", done, total)
    return Evaluation(correct.item() / total, loss.item() / total, total)


def _logits(output: object, labels: Tensor) -> Tensor:
    """The model's output as float32 logits (N, K) that the labels (N,) fit."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise StiefelError(
            f"the model is no classifier: it returns {what}, not logits (N, classes)"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= output.shape[1]:
        raise StiefelError(
            f"the data has a label {low if low < 0 else high}, the model tells "
            f"{output.shape[1]} classes apart (0 to {output.shape[1] - 1})"
        )
    return output.float()
