"""When work is run, when it is recorded, and when replayed; with graphs that only keep count."""

import random
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from converter.errors import StiefelError
from trainers import capture
from trainers.capture import WARM_UP, Recorded, RecordedStep, can_record
from trainers.rules import BP, DFA, SSA, StepResult

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class _Stream:
    def wait_stream(self, other):
        pass


class _Graph:
    """Stands for a CUDA graph: replaying runs none of the recorded Python."""

    replays = 0

    def replay(self):
        _Graph.replays += 1


@pytest.fixture(autouse=True)
def _fake_cuda(monkeypatch):
    @contextmanager
    def recording(graph, pool, stream, capture_error_mode):
        yield

    _Graph.replays = 0
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(capture, "_pool", lambda: None)
    monkeypatch.setattr(capture, "_free_generator", lambda: None)


def test_work_is_run_to_warm_up_then_once_to_be_recorded():
    calls = []
    recorded = Recorded(lambda: calls.append(1))
    for _ in range(WARM_UP + 5):
        recorded()
    assert len(calls) == WARM_UP + 1
    assert _Graph.replays == 5  # the recording itself computes nothing


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(1), lambda: np.random.rand()])
def test_work_that_draws_on_the_host_is_always_run(draw):
    calls = []
    recorded = Recorded(lambda: calls.append(draw()))
    for _ in range(WARM_UP + 5):
        recorded()
    assert len(calls) == WARM_UP + 5
    assert _Graph.replays == 0


def test_what_cannot_be_recorded_is_told_with_its_first_cause():
    seen = []

    def work():
        seen.append(1)
        if len(seen) > WARM_UP:
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            except RuntimeError:
                raise RuntimeError("failed due to a previous error")  # noqa: B904, as torch does

    recorded = Recorded(work)
    for _ in range(WARM_UP):
        recorded()
    with pytest.raises(
        StiefelError, match=r"\(operation not permitted when stream is capturing\); .*cuda_graph"
    ):
        recorded()


def test_gradients_have_one_place_which_is_zeroed_where_they_were_cleared():
    layer = torch.nn.Linear(3, 2)
    unused = torch.nn.Parameter(torch.zeros(2))

    def learn(x, y):
        loss = (layer(x) - y).square().sum()
        loss.backward()
        return StepResult(loss.detach(), loss.detach())

    step = RecordedStep(learn, [*layer.parameters(), unused])
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    for _ in range(WARM_UP + 1):
        step(x, y)
    place = layer.weight.grad
    layer.zero_grad()  # sets it to None
    step(x, y)
    assert layer.weight.grad is place
    assert torch.equal(place, torch.zeros(2, 3))  # replaying adds to it on a GPU
    layer.weight.grad.add_(1)
    step(x, y)  # a second part of the same batch
    assert torch.equal(place, torch.ones(2, 3))
    assert unused.grad is None


@pytest.mark.parametrize(
    ("rule", "device", "processes", "expected"),
    [
        (SSA(), CUDA, 1, True),
        (BP(), CUDA, 1, True),
        (DFA(), CUDA, 1, True),
        (SSA(), CPU, 1, False),
        (SSA(), CUDA, 2, False),
        (SSA(error="global", storage="recomputed"), CUDA, 1, False),
        (DFA(storage="recomputed"), CUDA, 1, False),
    ],
)
def test_which_steps_can_be_recorded(rule, device, processes, expected):
    assert can_record(rule, device, processes) is expected
