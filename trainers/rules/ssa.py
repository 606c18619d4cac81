"""SVD-space alignment: local losses, and feedback in the weights' own structure.

The composite loss of a block is a sum, each term with its coefficient: the error (of the block's
own read-out, or of the output, sent through B), similarity matching, local distillation, alignment
of U with the feedback's subspace, orthogonality, the cosine term and Hoyer sparsity.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from converter.factors import Factored
from trainers import losses
from trainers.cuts import Cuts, cut
from trainers.cuts.walk import Few
from trainers.distributed import World
from trainers.feedback import kernel_directions
from trainers.readout import Features
from trainers.rules.draw import draw_feedback
from trainers.rules.interface import StepResult
from trainers.rules.local import Batch, LocalState
from trainers.rules.overlap import has_streams, independent, overlapped_pass
from trainers.rules.passes import GLOBAL_PASSES, BlockLoss, immediate_pass
from trainers.rules.sampling import few, in_front, put_back
from trainers.rules.settings import SSA
from trainers.rules.teacher import Lesson, Teacher


class SVDSpaceAlignment:
    """Each block trains on its own composite loss."""

    def __init__(self, settings: SSA) -> None:
        self.settings = settings

    def init(
        self,
        network: nn.Module,
        example: Tensor,
        num_classes: int,
        generator: torch.Generator,
        teacher: nn.Module | None = None,
    ) -> nn.Module:
        """See `Rule.init`."""
        settings = self.settings.resolved(with_teacher=teacher is not None)
        cuts = cut(network, example, settings)
        drawn = draw_feedback(settings, network, cuts, example, num_classes, generator)
        taught = None
        if settings.distillation:
            taught = Teacher(teacher, network, cuts, example, num_classes, settings)
        state = SSAState(settings, cuts, *drawn, num_classes, taught)
        if settings.sample > 1:
            state.counts = cuts.counts(example)
        return state.to(example)  # its dtype too

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
        settings, cuts = state.settings, state.cuts
        count = few(len(x), settings.sample)
        if sampled := count < len(x):
            x, y = (in_front(rows, settings.sample) for rows in (x, y))
            cuts = cuts.learning_from(Few(count, state.counts))
        batch = Batch(y, scale, label_smoothing)
        block_loss: BlockLoss = _Composite(state, x, batch)
        if sampled:
            block_loss = _Sampled(block_loss, _Composite(state, x, replace(batch, y=y[:count])))
        if settings.error == "global":
            run = GLOBAL_PASSES[settings.storage]
        elif state.overlaps and has_streams(x.device, World.here().size):
            run = partial(overlapped_pass, count=settings.overlap)
        else:
            run = immediate_pass
        result = run(network, cuts, x, batch, block_loss)
        if sampled:
            result = replace(result, logits=put_back(result.logits, settings.sample))
        return result


class SSAState(LocalState):
    """Adds the settings with every coefficient resolved, and what U is aligned with.

    Attributes:
        settings: no coefficient is None any more.
        teacher: the dense original, cut alike, or None.
        factored: each block's factored layers.
        overlaps: whether several blocks may be at work at once.
        counts: what crosses cuts and counts a batch's images, where blocks learn from a sample.
    """

    counts: frozenset[str] = frozenset()

    def __init__(
        self,
        settings: SSA,
        cuts: Cuts,
        views: list[list[Features]],
        feedback: list[list[nn.Module]],
        num_classes: int,
        teacher: Teacher | None,
    ) -> None:
        super().__init__(cuts, views, feedback)
        self.settings, self.teacher = settings, teacher
        self.num_classes = num_classes
        self.factored = tuple(
            tuple(m for m in block.module.modules() if isinstance(m, Factored))
            for block in cuts.blocks
        )
        self.overlaps = settings.overlap > 1 and independent(cuts)
        for index, modules in enumerate(feedback[:-1] if settings.alpha else []):
            for view, module in zip(views[index], modules, strict=True):
                self._aim(index, view, module)

    def directions(self, index: int) -> Tensor | None:
        """P (m, k) of `losses.alignment` for the block's last factored layer, if they fit."""
        return getattr(self, f"directions_{index}", None)

    def _aim(self, index: int, view: Features, feedback: nn.Module) -> None:
        if not self.factored[index]:
            return
        U = self.factored[index][-1].U
        if U.ndim == 2 and U.shape[0] % view.root.channels == 0:
            channels = view.channels(feedback.subspace.detach(), U.shape[1])
            P = kernel_directions(channels, U.shape[0])
            self.register_buffer(f"directions_{index}", P)


class _Sampled:
    """The last block's loss is of the whole batch, the others' of a few images: a `BlockLoss`."""

    def __init__(self, whole: BlockLoss, few: BlockLoss) -> None:
        self.whole, self.few = whole, few

    def __call__(
        self, index: int, roots: tuple[Tensor, ...], logits: Tensor | None, error: Tensor | None
    ) -> Tensor:
        loss = self.few if logits is None else self.whole
        return loss(index, roots, logits, error)


class _Composite:
    """The composite losses of one step: a `passes.BlockLoss`."""

    def __init__(self, state: SSAState, x: Tensor, batch: Batch) -> None:
        self.state, self.batch, self.world = state, batch, World.here()
        self.lessons = state.teacher.lessons(x) if state.teacher is not None else None
        self._similar = self._similarity() if state.settings.similarity else None

    def __call__(
        self, index: int, roots: tuple[Tensor, ...], logits: Tensor | None, error: Tensor | None
    ) -> Tensor:
        terms = list(self._on_roots(index, roots, error))
        if logits is not None:
            terms.append(self.batch.cross_entropy(logits))
        if self.lessons is not None:
            terms += self._taught(roots, next(self.lessons))
        terms += self._on_factors(index)
        return self.batch.total(terms)

    def _on_roots(
        self, index: int, roots: tuple[Tensor, ...], error: Tensor | None
    ) -> Iterator[Tensor]:
        settings, batch = self.state.settings, self.batch
        if not (settings.cross_entropy or settings.similarity or settings.cosine):
            return
        modules = self.state.feedback[index]
        for place, z in enumerate(self.state.features(index, roots)):
            # The last block's read-out is the output head, so it has no feedback of its own.
            feedback = modules[place] if len(modules) else None
            if settings.cross_entropy and feedback is not None:
                rest = (batch.y, batch.label_smoothing)
                term = (
                    feedback.local_loss(z, *rest)
                    if error is None
                    else feedback.global_loss(z, error, *rest)
                )
                yield settings.cross_entropy * term
            if settings.similarity:
                alike = losses.similarity_matching(self.world.rows(z), self._similar)
                yield settings.similarity * alike
            if settings.cosine and feedback is not None:
                targets = self._targets().to(feedback.subspace.dtype)
                yield settings.cosine * losses.cosine(z, feedback.back(targets))

    def _taught(self, roots: tuple[Tensor, ...], lesson: Lesson) -> Iterator[Tensor]:
        """Distillation here and at each cut of the lookahead, and cross-entropy at the output."""
        weight = self.state.settings.distillation
        pairs = [*zip(roots, lesson.roots, strict=True)]
        for given, wanted, logits in lesson.onward(roots):
            pairs += zip(given, wanted, strict=True)
            if logits is not None:
                yield self.batch.cross_entropy(logits)
        for h, target in pairs:
            yield weight * self._distillation(h, target)

    def _on_factors(self, index: int) -> list[Tensor]:
        settings = self.state.settings
        layers = self.state.factored[index]
        terms = []
        if settings.alpha and (P := self.state.directions(index)) is not None:
            terms.append(settings.alpha * losses.alignment(layers[-1].U, P))
        for layer in layers:
            if settings.beta:
                penalty = losses.orthogonality(layer.U) + losses.orthogonality(layer.V)
                terms.append(settings.beta * penalty)
            if settings.hoyer:
                terms.append(settings.hoyer * losses.hoyer(layer.S))
        return terms

    def _targets(self) -> Tensor:
        """One-hot labels (N, C), smoothed."""
        batch = self.batch
        return losses.probabilities(batch.y, self.state.num_classes, batch.label_smoothing)

    def _distillation(self, h: Tensor, target: Tensor) -> Tensor:
        """Of one root, relative to the variance over the whole batch."""
        return losses.distillation(h, target, self.world.variance(target))

    def _similarity(self) -> Tensor:
        """Y Yᵀ (N, N) of the whole batch."""
        return losses.similarity_target(self.world.rows(self.batch.y), self.state.num_classes)
