"""How images, maps and weights lie in memory."""

from collections.abc import Container, Iterator
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from converter.errors import StiefelError
from trainers.looking import in_mode, undisturbed
from trainers.trial import try_out

MemoryFormat = Literal["auto", "contiguous", "channels_last"]

FEW = 2  # images to try a layout on: batch norm tells no mean from one


def lay_out(name: MemoryFormat, images: Tensor, *networks: nn.Module) -> torch.memory_format:
    """Move the networks to the images' device, and give their weights a layout; say which.

    "auto" takes channels-last, in which convolutions, norms and pooling are quicker, on CPUs too;
    but contiguous where a network can't take it, as one that flattens maps with `view` can't, where
    it would give something else, or where weights share memory, which another layout would part.

    Args:
        images: (N, C, H, W), to try the networks on.

    Raises:
        StiefelError: channels-last is asked for, and a weight has five axes.
    """
    if name == "channels_last":
        _check_axes(networks)
    last = name == "channels_last" or (name == "auto" and _take_channels_last(images, networks))
    layout = torch.channels_last if last else torch.contiguous_format
    _move(networks, images.device, layout)
    return layout


def channels_last_in(network: nn.Module) -> set[str]:
    """Names of the weights and buffers that lie channels-last, and not contiguous as well."""
    return {
        name
        for name, tensor in _of_axes(4, network)
        if tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    }


def lay_back(network: nn.Module, last: Container[str]) -> None:
    """Undo `lay_out`: what `channels_last_in` found lies so, all else contiguous."""
    for name, tensor in _of_axes(4, network):
        layout = torch.channels_last if name in last else torch.contiguous_format
        tensor.data = tensor.data.contiguous(memory_format=layout)


def _of_axes(count: int, *networks: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of so many axes."""
    for network in networks:
        for name, tensor in chain(network.named_parameters(), network.named_buffers()):
            if tensor.ndim == count:
                yield name, tensor


def _take_channels_last(images: Tensor, networks: tuple[nn.Module, ...]) -> bool:
    """Whether all of them train so, and give the same."""
    if _share_memory(networks):
        return False
    few = images[:FEW].detach()
    try:
        _move(networks, images.device, torch.contiguous_format)
        expected = [_tried(network, few) for network in networks]
        _move(networks, images.device, torch.channels_last)
        last = few.contiguous(memory_format=torch.channels_last)
        found = [_tried(network, last) for network in networks]
    # Whatever a network raises; one that can't take the images at all is told of elsewhere.
    except Exception:
        return False
    return all(_alike(a, b) for a, b in zip(chain(*expected), chain(*found), strict=True))


def _tried(network: nn.Module, images: Tensor) -> list[Tensor]:
    """What it gives in evaluation; forward and backward in training must only run."""
    given = tree_leaves(try_out(network, images))
    x = images.clone().requires_grad_()
    trained = [p for p in network.parameters() if p.requires_grad]
    with undisturbed(network), in_mode(network, True):
        outputs = [t for t in tree_leaves(network(x)) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.grad([t.sum() for t in outputs], [x, *trained], allow_unused=True)
    return [t for t in given if isinstance(t, Tensor)]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether they differ by rounding alone, TF32's through many layers too."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 0.05 * a.abs().max())


def _share_memory(networks: tuple[nn.Module, ...]) -> bool:
    """Whether weights of maps are views of one memory, or shared with another process."""
    weights = {tensor for _, tensor in _of_axes(4, *networks)}
    storages = {tensor.untyped_storage().data_ptr() for tensor in weights}
    # All tensors on a GPU say that they are shared.
    shared = any(tensor.is_shared() for tensor in weights if tensor.device.type == "cpu")
    return shared or len(storages) < len(weights)


def _check_axes(networks: tuple[nn.Module, ...]) -> None:
    for name, _ in _of_axes(5, *networks):
        raise StiefelError(
            f"memory_format channels_last is for weights of up to four axes, '{name}' has five: "
            "use auto or contiguous"
        )


def _move(
    networks: tuple[nn.Module, ...], device: torch.device, layout: torch.memory_format
) -> None:
    for network in networks:
        network.to(device, memory_format=layout)
