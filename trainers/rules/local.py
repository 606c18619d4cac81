"""What the local rules share: their state, and how a block's loss is sent back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from converter.factors import Factored
from trainers.cuts import Block, Cuts, Root
from trainers.losses import cross_entropy
from trainers.readout import Features, HiddenLayers
from trainers.rules.settings import FeedbackSettings


@dataclass(frozen=True)
class Batch:
    """What a step knows of its batch besides the images; see `Rule.step`."""

    y: Tensor
    scale: float | Tensor
    label_smoothing: float

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Of logits (N, C), 0-d."""
        return cross_entropy(logits, self.y, self.label_smoothing)

    def total(self, terms: Sequence[Tensor]) -> Tensor:
        """Their sum, 0-d; of none 0, from which nothing is learned."""
        return sum(terms) if terms else torch.zeros((), device=self.y.device)


class LocalState(nn.Module):
    """A local rule's state: where the network is cut, and the feedback of each block's roots.

    Attributes:
        cuts: the network's blocks; not a part of the state_dict, `init` finds the same again.
        views: what read-outs and feedback see, one list of modules a block, one module a root.
        feedback: likewise; the last block has none.
    """

    def __init__(
        self,
        cuts: Cuts,
        views: list[list[Features]],
        feedback: list[list[nn.Module]],
    ) -> None:
        super().__init__()
        self.cuts = cuts
        self.views = nn.ModuleList(nn.ModuleList(modules) for modules in views)
        self.feedback = nn.ModuleList(nn.ModuleList(modules) for modules in feedback)

    def features(self, index: int, roots: tuple[Tensor, ...]) -> list[Tensor]:
        """What read-outs and feedback see of a block's roots: (N, D) each."""
        return [view(h) for view, h in zip(self.views[index], roots, strict=True)]


def block_rank(network: nn.Module, block: Block) -> int:
    """Rank of the block's last weighted layer that is factored; full rank where none is."""
    modules = [network.get_submodule(name) for name in block.layers]
    factored = [m for module in modules for m in module.modules() if isinstance(m, Factored)]
    if factored:
        return factored[-1].rank
    weights = [p for module in modules for p in module.parameters() if p.ndim > 1]
    return min(weights[-1].flatten(1).shape) if weights else 1


def choose_views(
    cuts: Cuts,
    settings: FeedbackSettings,
    ranks: list[int],
    hidden: Callable[[int, Root], HiddenLayers | None] = lambda index, root: None,
) -> list[list[Features]]:
    """What is seen of each root: at `pool`, or coarser where its feedback would be too large.

    Args:
        ranks: of each block's feedback; the last block has none, and is seen as it is.
        hidden: the layers that a root of the block of that index goes through first.
    """

    def view(index: int, root: Root, rank: int) -> Features:
        layers = hidden(index, root)
        last = root if layers is None else layers.output
        return Features(root, last.grid(settings.pool, settings.readout // rank), layers)

    views = [
        [view(index, root, rank) for root in block.roots]
        for index, (block, rank) in enumerate(zip(cuts.blocks[:-1], ranks, strict=True))
    ]
    return [*views, [Features(root, settings.pool) for root in cuts.blocks[-1].roots]]


def backward(loss: Tensor, scale: float | Tensor) -> None:
    """Accumulate `loss · scale` into `.grad`, outside autocast; or nothing, if it has no graph."""
    if not loss.requires_grad:
        return
    device = loss.device.type
    with torch.autocast(device, enabled=False):
        (loss * scale).backward()
