"""Blocks as wide as memory allows: the largest unit sets the peak, so smaller ones may be joined.

Early units have large maps and late ones small. Trained alone, each late unit would leave most of
the memory unused that an early one needs; joined, they are trained together, closer to backprop.
"""

from collections import ChainMap
from collections.abc import Callable
from functools import cache
from math import inf

import torch
from torch import Tensor, nn

from trainers.cuts.graph import Traced
from trainers.cuts.places import make_segments
from trainers.cuts.traced import TracedCuts
from trainers.looking import dropping, undisturbed


def balanced_ends(
    network: nn.Module,
    traced: Traced,
    ends: list[int],
    example: Tensor,
    share: float = 0.0,
    sample: int = 1,
) -> list[int]:
    """The fewest blocks that the bound on memory allows, and of their cuts those of least peak.

    The fewest blocks within a bound are had by joining units from the output backwards, each block
    as far as it goes; so the last one, which the labels reach, is wide. The peak is then lowered
    for as long as that takes no block more. In it every block but the last counts a twentieth more,
    as it has a read-out beside. Where the others learn from a sample, the last one stays as wide as
    it can be: it alone learns from all images.

    Args:
        network: the traced one.
        traced: its graph.
        ends: the units' ends.
        example: (N, C, H, W); one image of it is used.
        share: of what the whole network needs as one block, which a block may need where the
            largest unit needs less.
        sample: every block but the last learns from one image in so many.
    """
    segments = make_segments(traced, ends)
    each = cache(Need(network, TracedCuts(traced, segments), example))
    last = len(segments) - 1

    def need(first: int, end: int) -> float:
        return each(first, end) / (1 if end == last else sample)

    most = max(share * need(0, last), *(need(unit, unit) for unit in range(last + 1)))

    def held(block: tuple[int, int]) -> float:
        return need(*block) * (1.0 if block[1] == last else 1.05)

    def below(peak: float) -> list[tuple[int, int]]:
        return _joined(last, lambda block: need(*block) <= most and held(block) < peak)

    blocks = below(inf)
    while sample == 1:
        peak = max(map(held, blocks))
        lower = below(peak)
        if len(lower) > len(blocks) or max(map(held, lower)) >= peak:
            break
        blocks = lower
    hidden = [s.hidden for s in segments if s.hidden is not None]
    return [*(segments[end].end for _, end in blocks[:-1]), *hidden]


def _joined(last: int, fits: Callable[[tuple[int, int]], bool]) -> list[tuple[int, int]]:
    """Units 0..last as blocks (first, last unit) that fit, unless they are of a single unit."""
    blocks = [(last, last)]
    for unit in reversed(range(last)):
        wider = (unit, blocks[-1][1])
        if fits(wider):
            blocks[-1] = wider
        else:
            blocks.append((unit, unit))
    return blocks[::-1]


class Need:
    """Bytes that units first..last, as one block, save for backward, for each image of a batch.

    What does not grow with the batch (weights, and products of them) does not count.

    Args:
        network: the one that is cut.
        cuts: its units.
        example: (N, C, H, W); one image of it is used.
    """

    def __init__(self, network: nn.Module, cuts: TracedCuts, example: Tensor) -> None:
        self._few, self._more = (
            # Repeated, not a view: what is saved counts as large as its storage.
            _Saved(network, cuts, example[:1].repeat(images, *[1] * (example.ndim - 1)))
            for images in (2, 4)  # one alone is not half of two: some operations then save less
        )

    def __call__(self, first: int, last: int) -> int:
        return (self._more.bytes(first, last) - self._few.bytes(first, last)) // 2


class _Saved:
    """What each unit saves for backward, of one batch (N, C, H, W)."""

    def __init__(self, network: nn.Module, cuts: TracedCuts, x: Tensor) -> None:
        # Masks of dropout are saved too.
        with undisturbed(network), dropping(network), torch.enable_grad():
            self._alone = self._storages(cuts, x, detached=True)
            self._within = self._storages(cuts, x, detached=False)

    def bytes(self, first: int, last: int) -> int:
        """Of units first..last as one block; a storage that several save counts once."""
        # What a unit does before its first layer, such as pooling, is saved within a block only.
        before = sum(self._within[first].values()) - sum(self._alone[first].values())
        return sum(ChainMap(*self._within[first : last + 1]).values()) - before

    def _storages(self, cuts: TracedCuts, x: Tensor, detached: bool) -> list[dict[int, int]]:
        """Address and bytes of each storage that a unit saves."""
        saved: dict[int, int] = {}
        kept: list[Tensor] = []  # so that no storage's place is taken by another
        found: list[dict[int, int]] = []

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
            return kept[-1]  # the tensor itself would hold its own graph, which nothing frees then

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for _ in cuts.walk(x, detached):
                found.append(dict(saved))
                saved.clear()
                if detached:
                    kept.clear()
        return found
