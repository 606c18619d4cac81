"""Losses and right answers of an epoch, added up on the device so that no step waits for it."""

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
        stop: whether any process was asked to stop.
    """

    loss: float
    accuracy: float
    per_block: dict[str, float]
    stop: bool

    def nonfinite(self) -> tuple[str, float] | None:
        """The first loss that isn't finite, in the network's order, and its value; or None."""
        named = {f"the loss of block {name}": loss for name, loss in self.per_block.items()}
        for name, loss in {**named, "the loss": self.loss}.items():
            if not -float("inf") < loss < float("inf"):
                return name, loss
        return None


class Meter:
    """Adds up `StepResult`s of equally many images each."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums: Tensor | None = None  # right answers, loss, each block's loss; float64
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
        self._images += len(y)
        self._steps += 1

    def read(self, stop: bool) -> Reading:
        """The means of all processes; waits for the device.

        Args:
            stop: whether this process was asked to stop.
        """
        flag = self._sums.new_tensor([float(stop)])
        correct, loss, *local, stops = self._world.sum_(torch.cat([self._sums, flag])).tolist()
        steps, images = self._steps * self._world.size, self._images * self._world.size
        per_block = {n: v / steps for n, v in zip(self._blocks, local, strict=True)}
        return Reading(loss / steps, correct / images, per_block, stops > 0)

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
