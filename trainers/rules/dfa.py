"""Direct feedback alignment (Nøkland 2016): the output's error through dense random matrices."""

import torch
from torch import Tensor, nn

from trainers.cuts import cut
from trainers.feedback import DenseFeedback
from trainers.rules.interface import StepResult
from trainers.rules.local import Batch, LocalState, choose_views
from trainers.rules.passes import GLOBAL_PASSES
from trainers.rules.settings import DFA


class DirectFeedback:
    """Every block but the last is sent the output's error through its own fixed dense B."""

    def __init__(self, settings: DFA) -> None:
        self.settings = settings

    def init(
        self,
        network: nn.Module,
        example: Tensor,
        num_classes: int,
        generator: torch.Generator,
        teacher: nn.Module | None = None,
    ) -> nn.Module:
        """See `Rule.init`; a teacher is of no use here."""
        cuts = cut(network, example, self.settings)
        views = choose_views(cuts, self.settings, [num_classes] * (len(cuts.blocks) - 1))
        feedback = [
            [DenseFeedback(view.count, num_classes, generator) for view in seen]
            for seen in views[:-1]
        ]
        return LocalState(cuts, views, feedback).to(example)

    def step(
        self,
        network: nn.Module,
        state: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        scale: float | Tensor = 1.0,
        label_smoothing: float = 0.0,
    ) -> StepResult:
        """See `Rule.step`."""
        batch = Batch(y, scale, label_smoothing)

        def block_loss(
            index: int, roots: tuple[Tensor, ...], logits: Tensor | None, error: Tensor | None
        ) -> Tensor:
            if logits is not None:
                return batch.cross_entropy(logits)
            places = zip(state.features(index, roots), state.feedback[index], strict=True)
            return batch.total([feedback.global_loss(z, error, y) for z, feedback in places])

        return GLOBAL_PASSES[self.settings.storage](network, state.cuts, x, batch, block_loss)
