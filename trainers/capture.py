"""Work recorded once as a CUDA graph and replayed: one launch instead of hundreds.

Small networks leave a GPU idle while Python launches their kernels, the local rules' most of all.
"""

import random
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from converter.errors import StiefelError, first_line
from trainers.rules import RuleSettings, StepResult

WARM_UP = 3
"""Calls before the recording: libraries choose algorithms and take their workspaces in them."""


def can_record(rule: RuleSettings, device: torch.device, processes: int) -> bool:
    """Whether steps of this kind can be recorded.

    Not those of several processes, which wait for each other; nor those that recompute, since the
    random numbers to draw again are read back to the host.
    """
    recomputed = getattr(rule, "storage", None) == "recomputed"
    return device.type == "cuda" and processes == 1 and not recomputed


class Recorded:
    """Does what `work()` does, from the fourth call on by replaying a recording of it.

    Work that draws random numbers on the host (LayerDrop, say) would be replayed with the same ones
    for ever; it is never recorded.

    Args:
        work: on the current CUDA device; it must never wait for it, must find the same tensors in
            their places every time, and what it returns the next call overwrites.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm_ups = 0
        self._draws = False

    @property
    def warm(self) -> bool:
        """Whether the next call is recorded, or replayed."""
        return self._warm_ups == WARM_UP

    def __call__(self) -> Any:
        """Do it.

        Raises:
            StiefelError: it can't be recorded.
        """
        if not self.warm:
            return self._warm_up()
        if self._draws:
            return self._work()
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()
        return self._result

    def _warm_up(self) -> Any:
        self._warm_ups += 1
        numbers = _host_numbers()
        # On the recording's own stream, since autograd remembers where parameters were used.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._work()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._draws = self._draws or _host_numbers() != numbers
        return result

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads, that load images say, may meanwhile call what a recording forbids.
        rest = {"stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, pool=_pool(), **rest):
                self._result = self._work()
        except RuntimeError as error:
            # The first of several that follow from each other says what happened.
            while isinstance(error.__context__, RuntimeError):
                error = error.__context__
            _free_generator()
            raise StiefelError(
                "a training step of this network can't be recorded as a CUDA graph "
                f"({first_line(error)}); train with cuda_graph false"
            ) from error
        return graph


class RecordedStep:
    """`learn(x, y)`, recorded: every call must bring images and labels of the same shapes.

    Gradients are added to those that are there, or take the place of None, as in `learn`.

    Args:
        learn: forward and backward.
        parameters: all that may receive gradients.
    """

    def __init__(
        self, learn: Callable[[Tensor, Tensor], StepResult], parameters: Iterable[nn.Parameter]
    ) -> None:
        self._parameters = list(parameters)
        self._batch: tuple[Tensor, Tensor] | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._learn = Recorded(lambda: learn(*self._batch))

    def __call__(self, x: Tensor, y: Tensor) -> StepResult:
        """Accumulate gradients of one batch; see `Recorded`."""
        if self._batch is None:
            self._batch = x.clone(), y.clone()
        for place, given in zip(self._batch, (x, y), strict=True):
            place.copy_(given, non_blocking=True)
        if self._learn.warm:
            self._ready_gradients()
            return self._learn()
        result = self._learn()
        self._trained = [p for p in self._parameters if p.grad is not None]
        return result

    def _ready_gradients(self) -> None:
        """Where a gradient is None, the place that the graph adds to, holding zeros."""
        if not self._gradients:
            found = ((p, torch.zeros_like(p) if p.grad is None else p.grad) for p in self._trained)
            self._gradients = list(found)
        cleared = [(p, gradient) for p, gradient in self._gradients if p.grad is not gradient]
        if cleared:
            torch._foreach_zero_([gradient for _, gradient in cleared])
            for parameter, gradient in cleared:
                parameter.grad = gradient


@cache
def _pool() -> Any:
    """Where all recordings of this process have their tensors; they never run at the same time."""
    return torch.cuda.graph_pool_handle()


def _host_numbers() -> tuple[Any, ...]:
    """What changes when random numbers are drawn on the host."""
    _, keys, place, *_ = np.random.get_state()
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), keys.tobytes(), place


def _free_generator() -> None:
    """Let random numbers be drawn again: a recording that failed leaves their generator engaged."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())
