"""The feedback matrices of SVD-space alignment, one for each root of each block but the last."""

import torch
from torch import Tensor, nn

from converter.decompose import Factors
from converter.errors import StiefelError
from trainers.cuts import Cuts, Root
from trainers.feedback import KolenPollack, StructuredFeedback, fitted_factors, random_factors
from trainers.looking import in_mode, undisturbed
from trainers.readout import FINE, Features, HiddenLayers
from trainers.rules.local import block_rank, choose_views
from trainers.rules.settings import SSA

MOST_LAYERS = 4  # of a read-out; what more of them gain is less than noise


def draw_feedback(
    settings: SSA,
    network: nn.Module,
    cuts: Cuts,
    example: Tensor,
    num_classes: int,
    generator: torch.Generator,
) -> tuple[list[list[Features]], list[list[nn.Module]]]:
    """What is seen of each root, and modules with `local_loss`, `global_loss` and `back` for it.

    The rank is the layer's, at most the number of classes. The output head is the last block's
    read-out, so it needs no other: its list of modules is empty.
    """
    ranks = [min(block_rank(network, block), num_classes) for block in cuts.blocks[:-1]]

    def hidden(index: int, root: Root) -> HiddenLayers | None:
        # A map of one pixel is a vector, and has nothing for a convolution to see.
        if settings.readout_layers == 0 or not root.is_map or root.sides == (1, 1):
            return None
        depth = settings.readout_layers
        if depth is None:
            # A read-out stands for the layers to come, and is deep where these are many.
            following = sum(len(block.layers) for block in cuts.blocks[index + 1 :])
            depth = min(MOST_LAYERS, max(1, following // 3))
        if root.cells(settings.pool) == (1, 1):  # likewise
            depth = min(depth, FINE)
        return HiddenLayers(root, settings.pool, depth, settings.readout_width, generator)

    views = choose_views(cuts, settings, ranks, hidden)
    fitted = iter(_fit(settings, network, cuts, views, example, num_classes))

    def one(features: int, rank: int) -> nn.Module:
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
        [one(view.count, rank) for view in seen] for seen, rank in zip(views, ranks, strict=False)
    ]
    return views, [*feedback, []]


def _fit(
    settings: SSA,
    network: nn.Module,
    cuts: Cuts,
    views: list[list[Features]],
    example: Tensor,
    num_classes: int,
) -> list[tuple[Factors, Tensor]]:
    """Regress the network's own logits on each root's features, over the example.

    Raises:
        StiefelError: the example is a single image, from which B would be 0 and teach nothing.
    """
    if settings.feedback != "calibrated":
        return []
    found: list[Tensor] = []

    def visit(index: int, roots: tuple[Tensor, ...], logits: Tensor | None) -> None:
        if logits is None:
            pairs = zip(views[index], roots, strict=True)
            found.extend(view.to(h)(h).cpu() for view, h in pairs)

    with undisturbed(network), in_mode(network, False), torch.no_grad():
        logits = cuts.run(example, visit)
    if found and len(example) == 1:
        raise StiefelError(
            "a batch of 1 image is too small to calibrate feedback on; give a larger batch_size, "
            "or feedback learned"
        )
    return [fitted_factors(z, logits.cpu(), num_classes) for z in found]


def _cut(factors: Factors, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return factors.U[:, :rank], factors.S[:rank], factors.V[:, :rank]
