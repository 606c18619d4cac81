"""Work recorded once as a CUDA graph and replayed: one launch instead of hundreds.

Small networks leave a GPU idle while Python launches their kernels, the local rules' most of all.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from converter.errors import StiefelError, first_line
from trainers.randomness import host_state
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
    """Does what `work(*args)` does, from the fourth call on by replaying a recording of it.

    Work that draws from the host's generators (LayerDrop, say), or puts another tensor in the place
    of a watched one, is never recorded. What else it does on the host, such as counting its calls,
    a replay leaves out.

    Args:
        work: on the current CUDA device; it must never wait for it, must be given the same tensors
            every time, and what it returns the next call overwrites.
        watched: gives the tensors that are to stay in their places.
    """

    def __init__(
        self, work: Callable[..., Any], watched: Callable[[], Iterable[Tensor]] = tuple
    ) -> None:
        self._work, self._watched = work, watched
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm_ups = 0
        self._moves = False

    @property
    def replays(self) -> bool:
        """Whether calls from now on are replays, the next one perhaps of its own recording."""
        return self._warm_ups == WARM_UP and not self._moves

    def __call__(self, *args: Any) -> Any:
        """Do it.

        Raises:
            StiefelError: it can't be recorded.
        """
        if self._warm_ups < WARM_UP:
            return self._warm_up(*args)
        if self._moves:
            return self._work(*args)
        if self._graph is None:
            self._graph = self._record(*args)
        self._graph.replay()
        return self._result

    def _warm_up(self, *args: Any) -> Any:
        self._warm_ups += 1
        stream, here = _stream(torch.cuda.current_device()), torch.cuda.current_stream()
        before = self._host_state()
        # On the recording's own stream, since autograd remembers where parameters were used.
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            result = self._work(*args)
        here.wait_stream(stream)
        self._moves = self._moves or self._host_state() != before
        return result

    def _record(self, *args: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads, that load images say, may meanwhile call what a recording forbids.
        stream = _stream(torch.cuda.current_device())
        rest = {"stream": stream, "pool": _pool(), "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, **rest):
                self._result = self._work(*args)
        except RuntimeError as error:
            # The first of several that follow from each other says what happened.
            while isinstance(error.__context__, RuntimeError):
                error = error.__context__
            _free_generator()
            raise StiefelError(
                "a training step of this network can't be recorded as a CUDA graph "
                f"({first_line(error)}); let go of its earlier outputs if they are still held, or "
                "train with cuda_graph false"
            ) from error
        return graph

    def _host_state(self) -> tuple[Any, ...]:
        """What changes when numbers are drawn on the host, or watched tensors replaced."""
        return host_state(), [(id(tensor), tensor.data_ptr()) for tensor in self._watched()]


class RecordedStep:
    """`learn(x, y)`, recorded: every call must bring images and labels of the same shapes.

    Gradients are added to those that are there, or take the place of None, as in `learn`.

    Args:
        learn: forward and backward.
        modules: whose parameters receive gradients, and whose buffers are to stay in their places.
    """

    def __init__(
        self, learn: Callable[[Tensor, Tensor], StepResult], modules: Iterable[nn.Module]
    ) -> None:
        modules = list(modules)
        self._parameters = [p for module in modules for p in module.parameters()]
        self._batch: tuple[Tensor, Tensor] | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._learn = Recorded(learn, lambda: (b for m in modules for b in m.buffers()))

    @property
    def replays(self) -> bool:
        """See `Recorded.replays`; gradients have their places for good then."""
        return self._learn.replays

    def __call__(self, x: Tensor, y: Tensor) -> StepResult:
        """Accumulate gradients of one batch; see `Recorded`."""
        if self._batch is None:
            self._batch = x.clone(), y.clone()
        else:
            for place, given in zip(self._batch, (x, y), strict=True):
                place.copy_(given, non_blocking=True)
        if self.replays:
            self._ready_gradients()
        result = self._learn(*self._batch)
        if self.replays and not self._gradients:  # that was the last to warm up
            found = ((p, p.grad) for p in self._parameters)
            self._gradients = [(p, gradient) for p, gradient in found if gradient is not None]
        return result

    def _ready_gradients(self) -> None:
        """Where a gradient is None, the place that the graph adds to, holding zeros."""
        cleared = [(p, gradient) for p, gradient in self._gradients if p.grad is not gradient]
        if cleared:
            torch._foreach_zero_([gradient for _, gradient in cleared])
            for parameter, gradient in cleared:
                parameter.grad = gradient


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """Of all recordings on a device: memory of their pool is shared within one stream only."""
    return torch.cuda.Stream(device)


@cache
def _pool() -> Any:
    """Where all recordings of this process have their tensors; they never run at the same time."""
    return torch.cuda.graph_pool_handle()


def _free_generator() -> None:
    """Let random numbers be drawn again: a recording that failed leaves their generator engaged."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())
