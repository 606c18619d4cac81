"""A forward pass that stops at every cut, and can be left there with other values."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from trainers.cuts.blocks import Root, logits_of


@dataclass(frozen=True)
class Part:
    """A block ready to run: `module` maps the values of `given` to those of `made`.

    `passed` are those that later blocks read, `done` those of `given` that none reads any more;
    `overwritten` are those of `given` that this block writes into.
    """

    module: fx.GraphModule
    given: tuple[str, ...]
    made: tuple[str, ...]
    roots: tuple[Root, ...]
    passed: tuple[str, ...]
    done: tuple[str, ...]
    overwritten: frozenset[str]
    last: bool

    def run(self, *given: Any) -> tuple[Any, ...]:
        """The values of `made`; those of `given` stay as they are, whatever the block does."""
        # Others hold them too: an earlier block's graph, its loss, and snapshots.
        pairs = zip(self.given, given, strict=True)
        own = (value.clone() if name in self.overwritten else value for name, value in pairs)
        return self.module(*own)


@dataclass(frozen=True)
class Few:
    """The first images of a batch, from which blocks before the last learn.

    Attributes:
        images: how many.
        counts: names of the plain numbers between blocks that count a batch's images.
    """

    images: int
    counts: frozenset[str]

    def run(self, part: Part, given: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a block makes of the few, with its graph; what it passes on of all images, without.

        Args:
            given: emptied, so that nothing of the other images is held any more.
        """
        split = [self._split(name, v) for name, v in zip(part.given, given, strict=True)]
        given.clear()
        with torch.no_grad():
            others = dict(zip(part.made, part.run(*(rest for _, rest in split)), strict=True))
        # Copies: the graph would hold on to all images otherwise.
        own = [v.clone() if isinstance(v, Tensor) else v for v, _ in split]
        split.clear()
        few = dict(zip(part.made, part.run(*own), strict=True))
        with torch.no_grad():
            return few, {name: self._joined(name, few[name], others[name]) for name in part.passed}

    def _split(self, name: str, value: Any) -> tuple[Any, Any]:
        if isinstance(value, Tensor):
            return value[: self.images], value[self.images :]
        return (self.images, value - self.images) if name in self.counts else (value, value)

    def _joined(self, name: str, few: Any, others: Any) -> Any:
        if isinstance(few, Tensor):
            return torch.cat([few, others])
        return few + others if name in self.counts else few


class Walk(Iterator[tuple[tuple[Tensor, ...], Tensor | None]]):
    """Runs one block for each `next`: its roots, and the logits at the last (None before).

    Args:
        parts: all blocks.
        environment: what is live where the walk begins, by name.
        start: the block that runs first.
        detached: whether what passes a cut is detached.
        recomputed: whether blocks run again for their backward, which then holds what enters them
            alone; they must draw nothing at random and keep no statistics.
        few: what blocks before the last learn from: their roots are of these images alone, and of
            the others only what crosses a cut is made.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        environment: Mapping[str, Any],
        start: int = 0,
        detached: bool = True,
        recomputed: bool = False,
        few: Few | None = None,
    ) -> None:
        self._parts, self._environment = parts, dict(environment)
        self._next, self._detached, self._recomputed = start, detached, recomputed
        self._few = few
        self._made: dict[str, Any] | None = None  # by the last block, before it passes the cut

    def __next__(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        if self._made is not None:
            passed = self._passed()
            self._environment |= _detached(passed) if self._detached else passed
            self._made = None
        if self._next == len(self._parts):
            raise StopIteration
        part = self._parts[self._next]
        given = [self._environment[name] for name in part.given]
        for name in part.done:
            del self._environment[name]
        if self._few is not None and not part.last:
            made, self._made = self._few.run(part, given)
            self._next += 1
            return tuple(made[root.name] for root in part.roots), None
        if self._recomputed and any(isinstance(v, Tensor) and v.requires_grad for v in given):
            # Reentrant, since hooks on saved tensors, and so the account of memory, see it.
            values = checkpoint(part.run, *given, use_reentrant=True, preserve_rng_state=False)
        else:
            values = part.run(*given)
        self._made = made = dict(zip(part.made, values, strict=True))
        self._next += 1
        logits = logits_of(made["output"]) if part.last else None
        return tuple(made[root.name] for root in part.roots), logits

    def crossing(self) -> list[Tensor]:
        """What the last block made for later ones, detached."""
        return [v for v in _detached(self._passed()).values() if isinstance(v, Tensor)]

    def snapshot(self) -> "Snapshot":
        """This stop, to go on from later and otherwise."""
        return Snapshot(self._parts, {**self._environment, **self._passed()}, self._next)

    def _passed(self) -> dict[str, Any]:
        """What the last block made for later ones, by name, with its graph."""
        return {name: self._made[name] for name in self._parts[self._next - 1].passed}


def _detached(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without their graphs."""
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}


@dataclass(frozen=True)
class Snapshot:
    """A stop of a walk: all blocks, what is live there, and the block that would run next."""

    parts: Sequence[Part]
    environment: Mapping[str, Any]
    start: int

    def onward(self, roots: tuple[Tensor, ...], recomputed: bool = False) -> Walk:
        """The walk from here with these roots instead of its own; gradients flow to them."""
        names = [root.name for root in self.parts[self.start - 1].roots]
        known = {**self.environment, **dict(zip(names, roots, strict=True))}
        return Walk(self.parts, known, self.start, detached=False, recomputed=recomputed)
