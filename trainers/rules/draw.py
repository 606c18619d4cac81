"""The feedback matrices of SVD-space alignment, one for each root of each block but the last."""

import torch
from torch import Tensor, nn

from converter.decompose import Factors
from trainers.cuts import Cuts, Root
from trainers.cuts.graph import in_mode
from trainers.feedback import KolenPollack, StructuredFeedback, fitted_factors, random_factors
from trainers.rules.local import block_rank, choose_grids, pooled
from trainers.rules.settings import SSA


def draw_feedback(
    settings: SSA,
    network: nn.Module,
    cuts: Cuts,
    example: Tensor,
    num_classes: int,
    generator: torch.Generator,
) -> tuple[list[list[int]], list[list[nn.Module]]]:
    """Sides of the grids, and modules with `local_loss`, `global_loss` and `back`; one each a root.

    The rank is the layer's, at most the number of classes. The output head is the last block's
    read-out, so it needs no other: its list of modules is empty.
    """
    ranks = [min(block_rank(network, block), num_classes) for block in cuts.blocks[:-1]]
    grids = choose_grids(cuts, settings, ranks)
    fitted = iter(_fit(settings, network, cuts, grids, example, num_classes))

    def one(root: Root, grid: int, rank: int) -> nn.Module:
        features = root.features(grid)
        if settings.feedback == "calibrated":
            factors, bias = next(fitted)
            return StructuredFeedback(Factors(*_cut(factors, rank)), bias, learned=False)
        bias = torch.zeros(num_classes)
        factors = random_factors(features, num_classes, rank, generator)
        if settings.feedback != "kolen-pollack":
            return StructuredFeedback(factors, bias, learned=settings.feedback == "learned")
        if settings.error == "global":
            return KolenPollack(factors)
        return KolenPollack(factors, random_factors(features, num_classes, rank, generator).U)

    feedback = [
        [one(root, grid, rank) for root, grid in zip(block.roots, sides, strict=True)]
        for block, sides, rank in zip(cuts.blocks, grids, ranks, strict=False)
    ]
    return grids, [*feedback, []]


def _fit(
    settings: SSA,
    network: nn.Module,
    cuts: Cuts,
    grids: list[list[int]],
    example: Tensor,
    num_classes: int,
) -> list[tuple[Factors, Tensor]]:
    """Regress the network's own logits on each root's features, over the example."""
    if settings.feedback != "calibrated":
        return []
    features: list[Tensor] = []

    def visit(index: int, roots: tuple[Tensor, ...], logits: Tensor | None) -> None:
        if logits is None:
            features.extend(pooled(cuts, grids, index, roots))

    with in_mode(network, False), torch.no_grad():
        logits = cuts.run(example, visit)
    return [fitted_factors(z.cpu(), logits.cpu(), num_classes) for z in features]


def _cut(factors: Factors, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return factors.U[:, :rank], factors.S[:rank], factors.V[:, :rank]
