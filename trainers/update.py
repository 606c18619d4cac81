"""From gradients to new weights: averaging, clipping, the optimizer, and the manifold."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainers.capture import Recorded
from trainers.distributed import GradientAverage, World
from trainers.manifold import RETRACTIONS, Manifold, tied_layers, truncate_
from trainers.optim import build_optimizer, learning_rate
from trainers.settings import TrainSettings


class Update:
    """Everything that happens after a backward pass; owns the optimizer.

    Args:
        network: whose parameters are trained, on their device.
        state: the rule's, whose parameters are trained along.
        steps: of the whole training.
    """

    def __init__(
        self,
        network: nn.Module,
        state: nn.Module,
        settings: TrainSettings,
        device: torch.device,
        world: World,
        steps: int,
    ) -> None:
        self._network, self._state, self._settings, self._world = network, state, settings, world
        self._device, self._steps, self._lr = device, steps, settings.lr
        network.zero_grad()  # what an earlier backward pass left is no part of the first step
        self._optimizer = build_optimizer(network, state, settings)
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        # Each part of each process is a mean of its own; their sum is to be the batch's mean.
        share = 1 / (settings.accumulate * world.size)
        self._share = torch.tensor(share, device=device) if self._scaler.is_enabled() else share
        self._hold_parameters()

    @property
    def lr(self) -> float:
        """The rate of the last step."""
        return self._lr

    def scale(self) -> float | Tensor:
        """What the rule is to multiply its losses with."""
        return self._scaler.scale(self._share) if self._scaler.is_enabled() else self._share

    def __call__(self, step: int) -> None:
        """Apply the gradients of step `step` (from 0) of the whole training, and clear them."""
        settings = self._settings
        self._average.finish()
        self._lr = learning_rate(step, self._steps, settings)
        if self._rate is not None:
            self._rate.fill_(self._lr)
        else:
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr
        self._apply()
        if settings.retract_every and (step + 1) % settings.retract_every == 0:
            self._retract()

    def settle(self, step: int) -> None:
        """After an epoch's last step: bring U and V back, unless that step has just done so."""
        if self._settings.retract_every and (step + 1) % self._settings.retract_every:
            self._retract()

    def record(self) -> None:
        """From now on replay the update as CUDA graphs, until a truncation.

        Gradients must stay in their places from now on, where they are zeroed, not cleared; which
        parameters have one must not change. With a gradient scaler all stays as it is.
        """
        if self._rate is not None or self._scaler.is_enabled():
            return
        self._rate = torch.tensor(self._lr, device=self._device)
        self._ready_optimizer()
        self._apply = Recorded(partial(self._apply, keep_gradients=True))
        # The other retractions decompose on the host, or ask it whether they succeeded.
        if self._settings.retraction == "newton-schulz":
            self._retract = Recorded(self._retract)

    def truncate(self, ranks: Mapping[str, int]) -> bool:
        """Lower the layers' ranks to `ranks`, the optimizer's state along; whether any fell.

        Args:
            ranks: by name; that of tied layers under the first one's, as `tied_layers` has it.
        """
        layers = tied_layers(self._network)
        falling = {name: rank for name, rank in ranks.items() if rank < layers[name][0].rank}
        if falling and self._settings.retract_every:
            self._retract()
        for name, rank in falling.items():
            layer, *tied = layers[name]
            truncate_(layer, rank, self._optimizer, tied)
        if falling:
            self._average.remove()
            self._hold_parameters()
        return bool(falling)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile gradients are nobody's business: none is sent to other processes."""
        self._average.remove()
        try:
            yield
        finally:
            self._average = GradientAverage(self._parameters, self._world)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's and the gradient scaler's."""
        optimizer = self._optimizer.state_dict()
        optimizer["param_groups"] = [g | {"lr": self._lr} for g in optimizer["param_groups"]]
        return {"optimizer": optimizer, "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of a network of the same ranks."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._lr = self._optimizer.param_groups[0]["lr"]
        self._ready_optimizer()

    def _ready_optimizer(self) -> None:
        """Tell it whether it is recorded, whatever a run that it goes on from did."""
        for group in self._optimizer.param_groups:
            if self._rate is not None:
                group["lr"] = self._rate
            if "capturable" in group:
                group["capturable"] = self._rate is not None

    def _hold_parameters(self) -> None:
        """Build what holds on to Parameters, which truncation replaces."""
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._manifold = Manifold(self._network)
        self._average = GradientAverage(self._parameters, self._world)
        self._rate: Tensor | None = None  # the optimizer's, where updates are recorded
        self._ready_optimizer()
        # Not through self: what is recorded would hold it, and be held by it.
        rest = (self._optimizer, self._scaler, self._parameters, self._manifold)
        self._apply: Callable[..., None] = partial(_apply, *rest, self._settings.clip)
        self._retract: Callable[[], None] = partial(
            self._manifold.retract_, RETRACTIONS[self._settings.retraction], self._optimizer
        )


def _apply(
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: list[nn.Parameter],
    manifold: Manifold,
    clip: float | None,
    keep_gradients: bool = False,
) -> None:
    """The optimizer's step; the gradients are cleared after, or zeroed where they are kept."""
    if clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=not keep_gradients)
    manifold.clamp_()
