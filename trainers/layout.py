"""How images, maps and weights lie in memory."""

from typing import Literal

import torch
from torch import Tensor, nn

from converter.errors import StiefelError
from trainers.trial import try_out

MemoryFormat = Literal["auto", "contiguous", "channels_last"]


def lay_out(name: MemoryFormat, images: Tensor, *networks: nn.Module) -> torch.memory_format:
    """Move the networks to the images' device, and give their weights a layout; say which.

    "auto" takes channels-last, in which convolutions, norms and pooling are quicker, on CPUs too;
    but contiguous where a network can't take it, as one that flattens maps with `view` can't.

    Args:
        images: (N, C, H, W), to try the networks on.
    """
    if name == "auto":
        return _channels_last_if_taken(images, networks)
    layout = torch.channels_last if name == "channels_last" else torch.contiguous_format
    _move(networks, images.device, layout)
    return layout


def _channels_last_if_taken(images: Tensor, networks: tuple[nn.Module, ...]) -> torch.memory_format:
    try:
        _move(networks, images.device, torch.channels_last)
        for network in networks:
            try_out(network, images.contiguous(memory_format=torch.channels_last))
    except (StiefelError, RuntimeError):  # the latter from weights of more than four axes
        _move(networks, images.device, torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def _move(
    networks: tuple[nn.Module, ...], device: torch.device, layout: torch.memory_format
) -> None:
    for network in networks:
        network.to(device, memory_format=layout)
