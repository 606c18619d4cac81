"""Blocks as wide as memory allows: the largest unit sets the peak, so smaller ones may be joined.

Early units have large maps and late ones small. Trained alone, each late unit would leave most of
the memory unused that an early one needs; joined, they are trained together, closer to backprop.
"""

import torch
from torch import Tensor, nn

from trainers.cuts.graph import Traced, in_mode
from trainers.cuts.places import make_segments
from trainers.cuts.traced import TracedCuts


def balanced_ends(
    network: nn.Module, traced: Traced, ends: list[int], example: Tensor
) -> list[int]:
    """Leave out every cut whose two sides together need no more memory than the largest unit.

    From the output backwards, so that the last block, which the labels reach, is as wide as can be.

    Args:
        network: the traced one.
        traced: its graph.
        ends: the units' ends.
        example: (N, C, H, W); one image of it is used.
    """
    segments = make_segments(traced, ends)
    needs = activation_bytes(network, TracedCuts(traced, segments), example)
    most, kept, total = max(needs), [], 0
    for segment, need in zip(reversed(segments), reversed(needs), strict=True):
        if total and total + need > most:
            kept.append(segment.end)
            total = 0
        total += need
    hidden = [s.hidden for s in segments if s.hidden is not None]
    return [*reversed(kept), *hidden]


def activation_bytes(network: nn.Module, cuts: TracedCuts, example: Tensor) -> list[int]:
    """Bytes that each block saves for its backward, for one more image in the batch."""
    # What does not grow with the batch are products of weights.
    few, more = (_saved_bytes(network, cuts, example[:1], images) for images in (1, 3))
    return [(b - a) // 2 for a, b in zip(few, more, strict=True)]


def _saved_bytes(network: nn.Module, cuts: TracedCuts, example: Tensor, images: int) -> list[int]:
    saved: dict[int, int] = {}
    needs: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def visit(index: int, roots: tuple[Tensor, ...], logits: Tensor | None) -> None:
        needs.append(sum(saved.values()))
        saved.clear()

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with in_mode(network, False), torch.enable_grad(), hooks:
        # A copy: what autograd saves counts as large as its storage, be it a batch's of which this
        # is one image.
        cuts.run(example.repeat(images, *[1] * (example.ndim - 1)), visit)
    return needs
