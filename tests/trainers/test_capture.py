"""Recorded work does what it would do if it were run; on a stand-in for CUDA graphs.

The stand-in notes every operation while it records, and replays them into the same memory, as a
graph would. What Python does besides is left out, as it would be.
"""

import gc
import random
import weakref
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from converter.errors import StiefelError
from tests.trainers.networks import digits_network as network
from trainers import capture, loop
from trainers.capture import WARM_UP, Recorded, RecordedStep, can_record
from trainers.rank_schedule import RankSchedule
from trainers.rules import BP, DFA, SSA, StepResult
from trainers.settings import TrainSettings
from trainers.trainer import train_local

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, other):
        pass


class Graph(TorchDispatchMode):
    """The operations of a recording, and how often they were replayed."""

    made: ClassVar[list["Graph"]] = []

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0
        Graph.made = [*Graph.made, weakref.proxy(self)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if not any(r.alias_info and not r.alias_info.is_write for r in returns):  # no view
            self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        if self.replays == 1:
            return  # on a CPU the recording has computed already
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


@contextmanager
def _recording(graph, pool, stream, capture_error_mode):
    with graph:
        yield


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """All graphs that a test records, in the order of their making."""
    Graph.made = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", _recording)
    monkeypatch.setattr(capture, "_stream", Stream)
    monkeypatch.setattr(capture, "_pool", lambda: None)
    monkeypatch.setattr(capture, "_free_generator", lambda: None)
    return lambda: Graph.made


def test_work_is_run_to_warm_up_then_once_to_be_recorded(graphs):
    calls, total = [], torch.zeros(())

    def work():
        calls.append(1)
        total.add_(1)

    recorded = Recorded(work)
    for _ in range(WARM_UP + 5):
        recorded()
    assert len(calls) == WARM_UP + 1
    assert graphs()[0].replays == 5
    assert total == WARM_UP + 5


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(1), lambda: np.random.rand()])
def test_work_that_draws_on_the_host_is_always_run(draw, graphs):
    calls = []
    recorded = Recorded(lambda: calls.append(draw()))
    for _ in range(WARM_UP + 5):
        recorded()
    assert len(calls) == WARM_UP + 5
    assert not graphs()
    assert not recorded.replays


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
    layer, unused = nn.Linear(3, 2), nn.Linear(1, 1)

    def learn(x, y):
        loss = (layer(x) - y).square().sum()
        loss.backward()
        return StepResult(loss.detach(), loss.detach())

    step = RecordedStep(learn, (layer, unused))
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    for _ in range(WARM_UP + 1):
        layer.zero_grad()
        step(x, y)
    place, once = layer.weight.grad, layer.weight.grad.clone()
    layer.zero_grad()  # sets it to None
    step(x, y)
    assert layer.weight.grad is place
    torch.testing.assert_close(place, once)
    step(x, y)  # a second part of the same batch
    torch.testing.assert_close(place, 2 * once)
    assert unused.weight.grad is None


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


@pytest.fixture
def train(monkeypatch, data):
    """Train a network recorded or launched: the losses of the epochs, and the weights."""

    def run(model, recorded, rule=None, **changes):
        if recorded:
            monkeypatch.setattr(loop, "can_record", lambda *_: True)
        # A rate that float32 holds exactly: recorded, it is a tensor.
        rate = {"lr": 2**-8, "schedule": "constant", "warmup": 0}
        plain = {"epochs": 3, "batch_size": 16, "device": "cpu", "retract_every": 2, **rate}
        resume = changes.pop("resume", {})
        settings = TrainSettings(**{**plain, **changes}, cuda_graph=recorded)
        history = train_local(model, data, rule=rule, settings=settings, **resume)
        return torch.tensor([r["loss"] for r in history.records]), weights(model)

    return run


def weights(model: nn.Module) -> Tensor:
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def assert_alike(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Losses and weights, up to rounding."""
    torch.testing.assert_close(theirs[0], mine[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs[1], mine[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        (SSA(), {}),
        (SSA(sample=2), {}),
        (SSA(boundaries="units", alpha=0.1, cosine=0.1), {"optimizer": "sgd", "clip": 1.0}),
        (SSA(error="global", feedback="kolen-pollack"), {"clip": 0.5}),
        (SSA(), {"accumulate": 2}),
        (SSA(), {"ranks": RankSchedule(final="0.2", every=1)}),
        (SSA(), {"diagnostics": 1}),
        (SSA(), {"retraction": "qr", "batch_norm": "frozen", "label_smoothing": 0.1}),
        (DFA(), {}),
        (BP(), {"accumulate": 4, "optimizer": "sgd"}),
    ],
)
def test_recorded_training_is_the_same_training(rule, changes, train, graphs):
    launched, recorded = (train(network(), on, rule, **changes) for on in (False, True))
    assert graphs()
    assert_alike(launched, recorded)


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_a_run_may_go_on_recorded_or_not(before, after, train, tmp_path):
    whole = train(network(), False)

    def stop(now):
        if now.get("epoch_done") and now["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), before, resume={"out": tmp_path, "progress": stop})
    resumed = train(network(), after, resume={"out": tmp_path, "resume": True})
    assert_alike(whole, resumed)


class Skipping(nn.Module):
    """It leaves a layer out in the first of its steps, and by a number drawn on the host later."""

    def __init__(self, first: int):
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 10)
        self.first, self.steps = first, 0

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            self.steps += 1
            if random.random() < 0.3 or self.steps <= self.first:
                return self.head(x)
        return self.head(torch.relu(self.body(x)))


class Averaging(nn.Module):
    """It keeps a running mean by putting a new tensor in its place."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 10)
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x):
        h = torch.relu(self.body(x.flatten(1)))
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(dim=0)
        return self.head(h - self.mean)


@pytest.mark.parametrize(
    "make",
    [*(lambda first=first: Skipping(first) for first in (0, 3, 5)), Averaging],
    ids=["skips", "skips the first three", "skips the first five", "replaces a buffer"],
)
def test_what_python_decides_is_decided_anew_each_step(make, train, graphs):
    found = []
    for recorded in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        found.append(train(make(), recorded, BP()))
    assert not graphs()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=0)


def test_nothing_of_a_recording_is_left_when_training_is_over(train, graphs):
    gc.collect()
    gc.disable()
    try:
        model = network()
        train(model, True, ranks=RankSchedule(final="0.2", every=1))
        assert len(graphs()) > 3
        assert not any(_alive(graph) for graph in graphs())
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        gc.enable()


def _alive(graph) -> bool:
    try:
        return graph.replays >= 0
    except ReferenceError:
        return False
