"""Losses and right answers of an epoch, added up on the device so that no step waits for it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainers.distributed import World
from trainers.rules import StepResult


@dataclass(frozen=True)
class Reading:
    """Means over the epoch so far, of all processes.

    Attributes:
        loss: cross-entropy of the network's output.
        accuracy: of the training images as they were seen, 0..1.
        per_block: block name → local loss.
        lasted: block name → how many steps, of all processes, before its loss was first not finite.
        stop: whether any process was asked to stop.
        pace: seconds a step, of all processes alike.
    """

    loss: float
    accuracy: float
    per_block: dict[str, float]
    lasted: dict[str, float]
    stop: bool
    pace: float

    def nonfinite(self, *, local: bool) -> tuple[str, float] | None:
        """The first loss that isn't finite, by steps and then by blocks, and its value; or None.

        Args:
            local: whether a block's loss is its own affair; else the output's goes before all.
        """
        bad = [name for name, loss in self.per_block.items() if not math.isfinite(loss)]
        if not math.isfinite(self.loss) and not (bad and local):
            return "the loss", self.loss
        if not bad:
            return None
        first = min(bad, key=self.lasted.__getitem__)
        return f"the loss of block {first}", self.per_block[first]


class Meter:
    """Adds up `StepResult`s of equally many images each."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums: Tensor | None = None  # right answers, loss, each block's loss; float64
        self._lasted: Tensor | None = None  # steps for which each of these sums was finite
        self._blocks: list[str] = []
        self._images = self._steps = 0

    def add(self, result: StepResult, y: Tensor) -> None:
        """Count one result on labels y (N,); a not-finite loss stays visible in the sum."""
        correct = (result.logits.argmax(1) == y).sum()
        found = torch.stack([correct, result.loss, *result.per_block.values()]).double()
        if self._sums is None:
            self._sums, self._blocks = found, list(result.per_block)
        else:
            self._sums += found
        finite = self._sums.isfinite().double()
        self._lasted = finite if self._lasted is None else self._lasted + finite
        self._images += len(y)
        self._steps += 1

    def read(self, stop: bool, pace: Callable[[], float]) -> Reading:
        """The means of all processes; waits for the device.

        Args:
            stop: whether this process was asked to stop.
            pace: seconds a step of this process, once the device has been waited for.
        """
        lasted = torch.zeros_like(self._sums) if self._lasted is None else self._lasted
        together = self._world.sum_(torch.stack([self._sums, lasted]))
        (correct, loss, *local), (_, _, *lasted) = together.tolist()
        own = self._sums.new_tensor([float(stop), pace()])
        stops, paces = self._world.sum_(own).tolist()
        steps, images = self._steps * self._world.size, self._images * self._world.size
        return Reading(
            loss / steps,
            correct / images,
            {name: value / steps for name, value in zip(self._blocks, local, strict=True)},
            dict(zip(self._blocks, lasted, strict=True)),
            stops > 0,
            paces / self._world.size,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data and one tensor: each process's even share; all must call it together."""
        sums = self._sums
        if sums is not None:
            sums = self._world.sum_(sums.clone()) / self._world.size
        return {
            "sums": sums,
            "blocks": self._blocks,
            "images": self._images,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a `state_dict`."""
        self._sums = None if state["sums"] is None else state["sums"].to(device)
        self._blocks, self._images, self._steps = state["blocks"], state["images"], state["steps"]
