"""Backpropagation: the baseline, in the same trainer and on the same network."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from converter.settings import Settings
from trainers.cuts.blocks import logits_of
from trainers.rules.interface import StepResult


class BP(Settings):
    """Backpropagation of the output's cross-entropy through the whole network."""

    name: Literal["bp"] = Field("bp", description="rule: backpropagation")


class Backpropagation:
    """One forward, one cross-entropy, one backward; its state is empty."""

    def __init__(self, settings: BP) -> None:
        self.settings = settings

    def init(
        self,
        network: nn.Module,
        example: Tensor,
        num_classes: int,
        generator: torch.Generator,
        teacher: nn.Module | None = None,
    ) -> nn.Module:
        """Nothing to keep: an empty module."""
        return nn.Module()

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
        logits = logits_of(network(x))
        loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
        (loss * scale).backward()
        return StepResult(loss.detach(), logits.detach())
