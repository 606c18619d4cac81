"""From gradients to new weights: averaging, clipping, the optimizer, and the manifold."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
        record: replay the update as a CUDA graph; gradients are then zeroed, not cleared, and must
            stay in their places.
    """

    def __init__(
        self,
        network: nn.Module,
        state: nn.Module,
        settings: TrainSettings,
        device: torch.device,
        world: World,
        steps: int,
        record: bool = False,
    ) -> None:
        self._network, self._state, self._settings, self._world = network, state, settings, world
        self._steps = steps
        network.zero_grad()  # what an earlier backward pass left is no part of the first step
        self._optimizer = build_optimizer(network, state, settings)
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        # A gradient scaler reads back whether there was an overflow.
        self._record = record and not self._scaler.is_enabled()
        self._rate = torch.tensor(settings.lr, device=device) if self._record else None
        self._lr = settings.lr
        self._ready_optimizer()
        # Each part of each process is a mean of its own; their sum is to be the batch's mean.
        share = 1 / (settings.accumulate * world.size)
        self._share = torch.tensor(share, device=device) if self._scaler.is_enabled() else share
        self._retraction = RETRACTIONS[settings.retraction]
        self._hold_parameters()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that are trained; others stand in their places after a truncation."""
        return list(self._parameters)

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
        if self._record:
            self._rate.fill_(self._lr)
        else:
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr
        self._apply()
        if settings.retract_every and (step + 1) % settings.retract_every == 0:
            self._retract()

    def truncate(self, ranks: Mapping[str, int]) -> bool:
        """Lower the layers' ranks to `ranks`, the optimizer's state along; whether any fell.

        Args:
            ranks: by name; that of tied layers under the first one's, as `tied_layers` has it.
        """
        layers = tied_layers(self._network)
        falling = {name: rank for name, rank in ranks.items() if rank < layers[name][0].rank}
        if falling and self._settings.retract_every:
            self._retract_now()
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
            if self._record:
                group["lr"] = self._rate
            if "capturable" in group:
                group["capturable"] = self._record

    def _apply_now(self) -> None:
        """The optimizer's step with the gradients that are there."""
        optimizer, scaler = self._optimizer, self._scaler
        if self._settings.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._settings.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=not self._record)
        self._manifold.clamp_()

    def _retract_now(self) -> None:
        self._manifold.retract_(self._retraction, self._optimizer)

    def _hold_parameters(self) -> None:
        """Build what holds on to Parameters, which truncation replaces."""
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._manifold = Manifold(self._network)
        self._average = GradientAverage(self._parameters, self._world)
        self._apply, self._retract = self._apply_now, self._retract_now
        if self._record:
            self._apply = Recorded(self._apply_now)
            # The other retractions decompose on the host, or ask it whether they succeeded.
            if self._settings.retraction == "newton-schulz":
                self._retract = Recorded(self._retract_now)
