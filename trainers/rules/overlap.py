"""Blocks side by side: on CUDA, one block's backward runs beside the next one's forward.

No gradient crosses a cut, so a block needs of the others what enters it and no more. A GPU that a
small network's kernels don't fill takes two blocks' at once in the time of one's.
"""

from functools import cache
from itertools import combinations

import torch
from torch import Tensor, nn

from trainers.cuts import Cuts
from trainers.cuts.traced import TracedCuts
from trainers.rules.interface import StepResult
from trainers.rules.local import Batch, backward
from trainers.rules.passes import BlockLoss, step_result


def has_streams(device: torch.device, processes: int) -> bool:
    """Whether blocks may be at work at once there; processes would wait for each other."""
    return device.type == "cuda" and processes == 1


def independent(cuts: Cuts) -> bool:
    """Whether blocks share no parameter and no buffer, which two could write at once."""
    if not isinstance(cuts, TracedCuts):
        return False
    held = [{*block.module.parameters(), *block.module.buffers()} for block in cuts.blocks]
    return all(a.isdisjoint(b) for a, b in combinations(held, 2))


def overlapped_pass(
    network: nn.Module, cuts: TracedCuts, x: Tensor, batch: Batch, block_loss: BlockLoss, count: int
) -> StepResult:
    """`immediate_pass`, up to `count` blocks at a time; see `passes` for the other arguments.

    A block waits for what enters it, and for the block `count` before it, in whose memory it then
    runs. `block_loss` must share nothing between blocks but what was there before the first.
    """
    streams, main = _streams(x.device, count), torch.cuda.current_stream(x.device)
    for stream in streams:
        stream.wait_stream(main)
    found: list[Tensor] = []
    held: list[Tensor] = []  # what crosses a cut is made on one stream and read on others
    ready: torch.cuda.Event | None = None
    walk = cuts.walk(x)
    for index, _ in enumerate(cuts.blocks):
        stream = streams[index % count]
        with torch.cuda.stream(stream):
            if ready is not None:
                stream.wait_event(ready)
            roots, logits = next(walk)
            held += walk.crossing()
            ready = stream.record_event()
            loss = block_loss(index, roots, logits, None)
            backward(loss, batch.scale)
            found.append(loss.detach())
            del roots, loss
    for stream in streams:
        main.wait_stream(stream)
    return step_result(cuts, found, logits.detach(), batch)


@cache
def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(count)]
