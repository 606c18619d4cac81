"""One pass forward, to see whether a network takes such images before anything is trained."""

from typing import Any

import torch
from torch import Tensor, nn

from converter.errors import StiefelError, first_line
from trainers.looking import in_mode, undisturbed


def try_out(network: nn.Module, images: Tensor, who: str = "the network") -> Any:
    """What the network gives for images (N, C, H, W) in eval mode; it stays as it was.

    Raises:
        StiefelError: it can't take them.
    """
    try:
        with in_mode(network, False), undisturbed(network), torch.no_grad():
            return network(images)
    # What torch's layers raise, and the assertions of torchvision's transformers.
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        shape, reason = "x".join(map(str, images.shape[1:])), first_line(error)
        raise StiefelError(
            f"{who} can't take images {shape} of {images.dtype}: {reason}"
        ) from error
