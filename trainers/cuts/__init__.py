"""Where a network is cut into local blocks, and how it then runs, block by block.

A cut is a place in the traced forward pass. Every tensor that is live there, made before and used
after, is detached for what follows: residual streams, concatenations and tokens alike. The float
tensors among them that the block made are its *roots*: what its local loss is made from. So no
gradient crosses a cut, and a block's activations can be freed as soon as its backward has run.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from converter.errors import StiefelError
from converter.specs import spec_of
from trainers.cuts.balance import balanced_ends
from trainers.cuts.blocks import Block, CutSettings, Root, Visit
from trainers.cuts.graph import trace
from trainers.cuts.named import NamedCuts
from trainers.cuts.places import choose_ends, make_segments
from trainers.cuts.traced import TracedCuts, not_its_original

__all__ = ["Block", "CutSettings", "Cuts", "Root", "Visit", "cut", "cut_alike", "describe_cuts"]


class Cuts(Protocol):
    """A network cut into blocks."""

    blocks: tuple[Block, ...]

    def run(self, x: Tensor, visit: Visit) -> Tensor:
        """Forward (N, C, H, W) to detached logits (N, classes), calling `visit` at every cut.

        `visit(index, roots, logits)` receives the block's roots with their graph, and the logits
        with theirs at the last block (None before); when it returns they are detached.
        """

    def walk(self, x: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        """Yield what `run` would give to `visit`: a forward that another can advance in step."""


def cut(network: nn.Module, example: Tensor, settings: CutSettings) -> Cuts:
    """Cut a network into blocks; what is returned runs this network's own modules.

    Args:
        network: left as it was.
        example: (N, C, H, W) on the network's device.
        settings: where to cut.

    Raises:
        StiefelError: the network can't be traced and no blocks are named, the names don't fit,
            blocks are named and it is also said where else to cut, or memory is to be shared out
            and blocks are not to be balanced.
    """
    check_cuts(settings)
    if settings.blocks:
        return NamedCuts(network, settings.blocks, example)
    traced = trace(network, example)
    ends = choose_ends(traced, settings)
    if settings.boundaries == "balanced":
        ends = balanced_ends(
            network, traced, ends, example, settings.memory, sample=settings.sample
        )
    return TracedCuts(traced, make_segments(traced, ends))


def check_cuts(settings: CutSettings) -> None:
    """Refuse settings that contradict each other, whatever the network.

    Raises:
        StiefelError: blocks are named and it is also said where else to cut, or memory is to be
            shared out and blocks are not to be balanced.
    """
    # A resolved recipe spells out defaults, so these are nobody's wish.
    asked = {
        n for n, field in CutSettings.model_fields.items() if getattr(settings, n) != field.default
    }
    held = ("boundaries", "memory", "layers_per_block", "sample")
    for name in held if settings.blocks else ():
        if name in asked:
            raise StiefelError(
                f"blocks names the blocks, so {name} has nothing to say: leave one out"
            )
    if "memory" in asked and settings.boundaries != "balanced":
        raise StiefelError(
            f"memory says how far blocks are balanced, and boundaries are {settings.boundaries}: "
            "leave one out"
        )


def cut_alike(cuts: Cuts, teacher: nn.Module, example: Tensor, settings: CutSettings) -> Cuts:
    """Cut the dense original where its factored form is cut.

    Raises:
        StiefelError: the teacher's structure is another.
    """
    if isinstance(cuts, TracedCuts):
        traced = trace(teacher, example, cuts.traced.opaque, training=False)
        alike: Cuts = cuts.alike(traced)
    else:
        alike = NamedCuts(teacher, settings.blocks, example)
    names, others = ([block.name for block in c.blocks] for c in (cuts, alike))
    if names != others:
        raise not_its_original(
            f"the teacher's blocks are {', '.join(others)}, the network's {', '.join(names)}"
        )
    shapes = [[root.shape for root in block.roots] for block in alike.blocks]
    for block, theirs in zip(cuts.blocks, shapes, strict=True):
        if [root.shape for root in block.roots] != theirs:
            raise not_its_original(
                f"the teacher yields {theirs} at block '{block.name}', the network "
                f"{[root.shape for root in block.roots]}"
            )
    return alike


def describe_cuts(
    network: nn.Module, example: Tensor | None = None, settings: CutSettings | None = None
) -> list[dict]:
    """The blocks as plain data: name, layers, parameters and the roots with their shapes.

    Args:
        network: any network.
        example: (N, C, H, W); by default zeros of the input shape of the network's specification.
        settings: where to cut; default settings if None.
    """
    if example is None:
        spec = spec_of(network)
        if spec is None:
            raise StiefelError("the model has no specification: pass an example input")
        example = torch.zeros(1, *spec.input.shape)
    cuts = cut(network, example, settings or CutSettings())
    return [
        {
            "block": block.name,
            "layers": list(block.layers),
            "parameters": sum(p.numel() for p in block.parameters()),
            "roots": [{"name": root.name, "shape": list(root.shape)} for root in block.roots],
        }
        for block in cuts.blocks
    ]
