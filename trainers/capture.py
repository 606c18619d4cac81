"""A training step recorded once as a CUDA graph and replayed: one launch instead of thousands.

Small networks leave a GPU idle while Python launches their kernels, the local rules' most of all.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from converter.errors import StiefelError
from trainers.rules import RuleSettings, StepResult

Learn = Callable[[Tensor, Tensor], StepResult]

WARM_UP = 3
"""Steps before the recording: libraries choose algorithms and take their workspaces in them."""


def can_record(rule: RuleSettings, device: torch.device, processes: int) -> bool:
    """Whether steps of this kind can be recorded.

    Not those of several processes, which wait for each other; nor those that recompute, since the
    random numbers to draw again are read back to the host.
    """
    recomputed = getattr(rule, "storage", None) == "recomputed"
    return device.type == "cuda" and processes == 1 and not recomputed


class RecordedStep:
    """Does what `learn(x, y)` does, from the fourth call on by replaying a recording of it.

    Every call must bring images and labels of the same shapes and find the same parameters trained.
    Gradients are added to those that are there, or take the place of None, as in `learn`.

    Args:
        learn: forward and backward; it must never wait for the device.
        parameters: all that may receive gradients.
    """

    def __init__(self, learn: Learn, parameters: Iterable[nn.Parameter]) -> None:
        self._learn, self._parameters = learn, list(parameters)
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def __call__(self, x: Tensor, y: Tensor) -> StepResult:
        """Accumulate gradients.

        Returns:
            What the next call will overwrite.

        Raises:
            StiefelError: the step can't be recorded.
        """
        if self._calls < WARM_UP:
            self._calls += 1
            return self._warm_up(x, y)
        if self._graph is None:
            self._record(x, y)
        self._x.copy_(x, non_blocking=True)
        self._y.copy_(y, non_blocking=True)
        self._ready_gradients()
        self._graph.replay()
        return self._result

    def _warm_up(self, x: Tensor, y: Tensor) -> StepResult:
        # Off the default stream, where a recording would wait for what autograd left there.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._learn(x, y)
        torch.cuda.current_stream().wait_stream(self._stream)
        self._trained = [p for p in self._parameters if p.grad is not None]
        return result

    def _record(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y = x.clone(), y.clone()
        self._gradients = [
            (p, torch.zeros_like(p) if p.grad is None else p.grad) for p in self._trained
        ]
        self._ready_gradients()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, that load images say, may call what a recording forbids.
            recording = {"stream": self._stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **recording):
                self._result = self._learn(self._x, self._y)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise StiefelError(
                f"a training step of this network can't be recorded as a CUDA graph ({reason}); "
                "train with cuda_graph false"
            ) from error
        self._graph = graph

    def _ready_gradients(self) -> None:
        """Where a gradient is None, the place that the graph adds to, holding zeros."""
        cleared = [(p, gradient) for p, gradient in self._gradients if p.grad is not gradient]
        if cleared:
            torch._foreach_zero_([gradient for _, gradient in cleared])
            for parameter, gradient in cleared:
                parameter.grad = gradient
