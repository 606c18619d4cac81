"""Three ways through a network cut into blocks: when each block's backward runs.

All take `block_loss(index, roots, logits, error)`: the block's local loss from its roots with their
graph, the logits at the last block (else None), and the output's error e (N, C) where it is known
(else None).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainers.cuts import Cuts
from trainers.looking import undisturbed
from trainers.losses import output_error
from trainers.rules.interface import StepResult
from trainers.rules.local import Batch, backward

BlockLoss = Callable[[int, tuple[Tensor, ...], Tensor | None, Tensor | None], Tensor]


def immediate_pass(
    network: nn.Module, cuts: Cuts, x: Tensor, batch: Batch, block_loss: BlockLoss
) -> StepResult:
    """Each block's backward runs at its cut and frees its graph: only local errors are known."""
    found: list[Tensor] = []

    def visit(index: int, roots: tuple[Tensor, ...], logits: Tensor | None) -> None:
        loss = block_loss(index, roots, logits, None)
        backward(loss, batch.scale)
        found.append(loss.detach())

    logits = cuts.run(x, visit)
    return step_result(cuts, found, logits, batch)


def stored_pass(
    network: nn.Module, cuts: Cuts, x: Tensor, batch: Batch, block_loss: BlockLoss
) -> StepResult:
    """One forward; all blocks' graphs are kept until the output's error is known."""
    kept: list[tuple[tuple[Tensor, ...], Tensor | None]] = []
    logits = cuts.run(x, lambda index, roots, output: kept.append((roots, output)))
    error = output_error(logits, batch.y, batch.label_smoothing)
    found = [block_loss(i, roots, output, error) for i, (roots, output) in enumerate(kept)]
    backward(torch.stack(found).sum(), batch.scale)
    return step_result(cuts, [loss.detach() for loss in found], logits, batch)


def recomputed_pass(
    network: nn.Module, cuts: Cuts, x: Tensor, batch: Batch, block_loss: BlockLoss
) -> StepResult:
    """A forward without gradients for the error, then one with a backward at each cut."""
    # Both forwards draw the same dropout masks; only the second updates what is kept of a batch.
    with _statistics_untouched(network) as norms, undisturbed(network, but=norms), torch.no_grad():
        logits = cuts.run(x, lambda *_: None)
    error = output_error(logits, batch.y, batch.label_smoothing)

    def informed(
        index: int, roots: tuple[Tensor, ...], logits: Tensor | None, _: Tensor | None
    ) -> Tensor:
        return block_loss(index, roots, logits, error)

    return immediate_pass(network, cuts, x, batch, informed)


@contextmanager
def _statistics_untouched(network: nn.Module) -> Iterator[set[nn.Module]]:
    """Norms use the batch's statistics in training and leave the running ones alone: these norms.

    Copies of the running ones, as for what others keep, would cost three kernels a norm and step.
    """
    # Instance norms write to the running ones even so.
    norms = {m for m in network.modules() if isinstance(m, _BatchNorm)}
    tracked = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in tracked:
        norm.track_running_stats = False
    try:
        yield norms
    finally:
        for norm in tracked:
            norm.track_running_stats = True


def step_result(cuts: Cuts, found: list[Tensor], logits: Tensor, batch: Batch) -> StepResult:
    """What a step leaves, from each block's loss, detached, and the detached logits."""
    names = [block.name for block in cuts.blocks]
    return StepResult(batch.cross_entropy(logits), logits, dict(zip(names, found, strict=True)))


GLOBAL_PASSES = {"stored": stored_pass, "recomputed": recomputed_pass}
