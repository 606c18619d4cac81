"""Running a network for a look at it: afterwards it is as it was."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from trainers.randomness import host_state, restore_host_state


@contextmanager
def in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Put every submodule in training or evaluation mode, and each back as it was."""
    before = [(m, m.training) for m in network.modules()]
    network.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


@contextmanager
def dropping(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that norms keep their statistics, but dropout drops as in training."""
    with in_mode(network, False):
        for module in network.modules():
            if isinstance(module, _DropoutNd):
                module.train()
        yield


@contextmanager
def undisturbed(*networks: nn.Module, but: Collection[nn.Module] = ()) -> Iterator[None]:
    """Afterwards their buffers and numbers are as they were, and random numbers still to come.

    So are tensors that modules hold as plain attributes.

    Args:
        but: modules that leave their own buffers alone, which then need no copies.
    """
    modules = [m for network in networks for m in network.modules() if m not in but]
    buffers = [
        (module, name, tensor)
        for module in modules
        for name, tensor in (*module.named_buffers(recurse=False), *plain_tensors(module).items())
    ]
    before = [buffer.clone() for _, _, buffer in buffers]
    devices = {p.device for n in networks for p in n.parameters() if p.device.type == "cuda"}
    numbers = numbers_of(*networks)
    generators = host_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            restore_host_state(generators)
            for module, own in numbers.items():
                vars(module).update(own)
            with torch.no_grad():
                for (module, name, buffer), value in zip(buffers, before, strict=True):
                    if not _is_expanded(buffer):  # into which nothing can be written
                        buffer.copy_(value)
                    setattr(module, name, buffer)  # a forward may have put another in its place


def _is_expanded(tensor: Tensor) -> bool:
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def plain_tensors(module: nn.Module) -> Mapping[str, Tensor]:
    """A module's own attributes that are tensors, neither parameters nor buffers nor of them."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not value.requires_grad
    }


def numbers_of(*networks: nn.Module) -> dict[nn.Module, Mapping[str, float]]:
    """Each module's attributes that are plain numbers, which its forward may count on."""
    return {
        module: {name: value for name, value in vars(module).items() if type(value) in (int, float)}
        for network in networks
        for module in network.modules()
    }
