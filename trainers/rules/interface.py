"""What every learning rule offers: `init` its own state once, then `step` on each batch."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StepResult:
    """What one step leaves behind besides the gradients in `.grad`.

    Attributes:
        loss: 0-d, detached: cross-entropy of the network's output on this batch, for every rule.
        logits: (N, classes), detached: the network's own output on this batch.
        per_block: block name → 0-d detached local loss, unscaled; empty for backprop.
    """

    loss: Tensor
    logits: Tensor
    per_block: dict[str, Tensor] = field(default_factory=dict)


class Rule(Protocol):
    """A learning rule. It owns no parameters: they live in the network and in the state."""

    def init(
        self,
        network: nn.Module,
        example: Tensor,
        num_classes: int,
        generator: torch.Generator,
        teacher: nn.Module | None = None,
    ) -> nn.Module:
        """Build the rule's state for this network.

        Args:
            network: the network to be trained; it is only looked at.
            example: (N, C, H, W) a batch of any size, on the network's device.
            num_classes: width of the network's output.
            generator: CPU generator that draws the feedback.
            teacher: the dense original, for local distillation; it is put in eval mode and frozen.

        Returns:
            A module: its parameters are trained along with the network's, its buffers are fixed,
            its `state_dict` resumes it. Neither network nor teacher is a part of it.
        """

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
        """Accumulate gradients of one batch into `.grad` of the network's and state's parameters.

        Args:
            network: the module that `init` saw.
            state: what `init` returned.
            x: (N, C, H, W) normalised images.
            y: (N,) class indices, or (N, classes) class probabilities.
            scale: multiplies every loss before its backward: 1/k for k accumulated batches, times
                the gradient scaler's factor under fp16.
            label_smoothing: weight of the uniform distribution in the targets, 0..1.
        """
