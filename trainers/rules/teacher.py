"""The dense original as a teacher: what it makes of an image at each cut, and of other features.

Its own features are what a block is to give. With a lookahead it also says what a block's features
lead to: they run on through the next blocks of the dense original, which stand for the network's
own. So no gradient comes from a later block of the network, the labels are heard in all of them,
and what is lost where it does no harm weighs little. Where several tensors cross a cut, those that
earlier blocks made are the teacher's too, and their errors are not seen. Interlocking
backpropagation (Gomez et al. 2022, arXiv 2010.04116) looks ahead too, through the network's own
blocks.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from converter.errors import StiefelError
from trainers.cuts import Cuts, cut_alike
from trainers.cuts.blocks import logits_of
from trainers.cuts.walk import Snapshot
from trainers.rules.settings import SSA
from trainers.trial import try_out


@dataclass(frozen=True)
class Lesson:
    """The teacher at one cut.

    Attributes:
        roots: its features here.
        later: its features at the next cuts, as many as the lookahead.
        here: from where other features run on; None without a lookahead.
        recomputed: whether its blocks run again for their backward.
    """

    roots: tuple[Tensor, ...]
    later: tuple[tuple[Tensor, ...], ...] = ()
    here: Snapshot | None = None
    recomputed: bool = False

    def onward(
        self, roots: tuple[Tensor, ...]
    ) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]]:
        """At each cut of the lookahead: what `roots` lead to, what is wanted, logits at the output.

        All but what is wanted have their graph back to `roots`.
        """
        if self.here is not None:
            walk = self.here.onward(roots, self.recomputed)
            for wanted in self.later:
                given, logits = next(walk)
                yield given, wanted, logits


class Teacher:
    """The dense original, cut where its factored form is.

    Args:
        teacher: the dense original; it is put in eval mode, and frozen.
        network: the factored network.
        cuts: the factored network's.
        example: (N, C, H, W), on the device to train on.
        num_classes: width of the network's output.
        settings: where to cut, and how many of its blocks a root runs on through (fewer where
            fewer are left).

    Raises:
        StiefelError: the teacher shares parameters with the network, is of another structure or
            can't take the images, or a lookahead is asked of blocks that are named or of a teacher
            of other classes.
    """

    def __init__(
        self,
        teacher: nn.Module,
        network: nn.Module,
        cuts: Cuts,
        example: Tensor,
        num_classes: int,
        settings: SSA,
    ) -> None:
        own = set(network.parameters())
        if any(parameter in own for parameter in teacher.parameters()):
            raise StiefelError(
                "the teacher shares parameters with the network, and is to stay as it is: give the "
                "dense original, or a copy"
            )
        if settings.lookahead and settings.blocks:
            raise StiefelError(
                "lookahead needs a network that is cut by its graph: leave blocks or lookahead out"
            )
        teacher.eval().requires_grad_(False).to(example.device)
        outputs = logits_of(try_out(teacher, example[:1], "the teacher")).shape[-1]
        if settings.lookahead and outputs != num_classes:
            raise StiefelError(
                f"the teacher tells {outputs} classes apart, the network {num_classes}: a "
                "lookahead needs the same"
            )
        self.cuts = cut_alike(cuts, teacher, example, settings)
        self.lookahead = settings.lookahead
        self.recomputed = settings.storage == "recomputed"

    def lessons(self, x: Tensor) -> Iterator[Lesson]:
        """One lesson a block on images (N, C, H, W); the teacher runs as far as each needs."""
        walk = self.cuts.walk(x)
        stops: deque[tuple[tuple[Tensor, ...], Snapshot | None]] = deque()
        for _ in self.cuts.blocks:
            while len(stops) <= self.lookahead:
                # The mode is a thread's, not a generator's: it must not outlast one step.
                with torch.no_grad():
                    stop = next(walk, None)
                if stop is None:
                    break
                stops.append((stop[0], walk.snapshot() if self.lookahead else None))
            roots, here = stops.popleft()
            later = tuple(roots for roots, _ in stops)
            yield Lesson(roots, later, here, self.recomputed)
            del roots, later, here  # not to be held while the teacher goes on
