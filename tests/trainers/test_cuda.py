"""Training on a GPU: `pytest -m gpu`."""

import copy
import random

import pytest
import torch
from torch import nn

from converter.convert import convert, plan
from converter.errors import StiefelError
from converter.factors import factored_layers
from converter.models import load
from tests.trainers.networks import digits_network as small
from trainers.capture import WARM_UP, RecordedStep, can_record
from trainers.data import Data, load_data
from trainers.device import autocast
from trainers.distributed import World
from trainers.evaluate import evaluate
from trainers.manifold import Manifold
from trainers.memory import allocator_peak
from trainers.rank_schedule import RankSchedule
from trainers.rules import BP, DFA, SSA, make_rule
from trainers.settings import TrainSettings
from trainers.trainer import train_local
from trainers.update import Update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA"),
]

CUDA = torch.device("cuda", 0)
RULES = {
    "bp": BP(),
    "dfa": DFA(),
    "layer-wise": SSA(),
    "layer-wise, all terms": SSA(memory=0, alpha=0.1, beta=0.1, cosine=0.1, hoyer=0.1),
    "layer-wise, of a sample": SSA(memory=0, sample=2),
    "layer-wise, of a sample, two blocks at once": SSA(memory=0, sample=2, overlap=2),
    "layer-wise, kolen-pollack": SSA(memory=0, feedback="kolen-pollack"),
    "layer-wise, two blocks at once": SSA(overlap=2, memory=0),
    "layer-wise, four at once": SSA(overlap=4, boundaries="units", cosine=0.1),
    "global": SSA(memory=0, error="global"),
    "global, recomputed": SSA(memory=0, error="global", storage="recomputed"),
}
RECORDED = {name: rule for name, rule in RULES.items() if can_record(rule, CUDA, 1)}


@pytest.fixture(autouse=True)
def _exact_products():
    """Convolutions in float32 are TensorFloat-32 on a GPU by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def settings(**changes) -> TrainSettings:
    plain = {"epochs": 4, "batch_size": 64, "lr": 5e-3, "device": "cuda"}
    return TrainSettings(**{**plain, **changes})


class Stepper:
    """A rule's step on a copy of a network, on a device."""

    def __init__(self, rule, network, images, labels, device=CUDA, teacher=None):
        self.network = copy.deepcopy(network).to(device)
        self.x, self.y = images.to(device), labels.to(device)
        teacher = None if teacher is None else copy.deepcopy(teacher).to(device)
        self.rule = make_rule(rule)
        rest = (5, torch.Generator().manual_seed(0), teacher)
        self.state = self.rule.init(self.network, self.x, *rest).to(device)

    def __call__(self, x=None, y=None):
        x, y = (self.x if x is None else x), (self.y if y is None else y)
        return self.rule.step(self.network, self.state, x, y)

    def parameters(self):
        return [*self.network.parameters(), *self.state.parameters()]

    def named_parameters(self):
        return [*self.network.named_parameters(), *self.state.named_parameters()]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", ["smallconv", "resnet20", "shared"])
def test_gradients_are_those_of_the_cpu(name, rule, factored, images, labels):
    network = factored(name)
    both = [Stepper(rule, network, images, labels, device) for device in ("cpu", CUDA)]
    losses = [float(step().loss) for step in both]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    found = [[p.grad for p in step.parameters()] for step in both]
    assert [g is None for g in found[0]] == [g is None for g in found[1]]
    mine, theirs = (torch.cat([g.cpu().flatten() for g in gs if g is not None]) for gs in found)
    assert (mine - theirs).norm() < 5e-3 * mine.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", RECORDED.values(), ids=RECORDED)
@pytest.mark.parametrize("name", ["smallconv", "resnet20", "vit"])
def test_a_step_never_waits_for_the_device(name, rule, precision, factored, images, labels):
    step = Stepper(rule, factored(name), images, labels)
    asked = settings(precision=precision, retract_every=1, clip=1.0)
    update = Update(step.network, step.state, asked, CUDA, World(), steps=10)

    def whole(number):
        with autocast(CUDA, precision):
            step()
        update(number)

    whole(0)  # the optimizer's state is made in the first
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", RECORDED.values(), ids=RECORDED)
@pytest.mark.parametrize("name", ["smallconv", "resnet20", "densenet"])
def test_a_recording_computes_what_the_step_does(name, rule, factored, images, labels):
    network = factored(name)
    eager, replayed = (Stepper(rule, network, images, labels) for _ in range(2))
    recorded = RecordedStep(replayed, (replayed.network, replayed.state))
    generator = torch.Generator().manual_seed(2)
    for call in range(WARM_UP + 3):
        x = torch.randn(images.shape, generator=generator).to(CUDA)
        y = torch.randint(5, labels.shape, generator=generator).to(CUDA)
        if call % 2:  # every other time gradients accumulate
            for parameter in (*eager.parameters(), *replayed.parameters()):
                parameter.grad = None
        expected, found = eager(x, y), recorded(x, y)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)
        for loss, other in zip(found.per_block.values(), expected.per_block.values(), strict=True):
            torch.testing.assert_close(loss, other, rtol=1e-3, atol=1e-4)
        for (key, mine), theirs in zip(
            eager.named_parameters(), replayed.parameters(), strict=True
        ):
            assert (mine.grad is None) == (theirs.grad is None), key
            if mine.grad is not None:
                scale = mine.grad.norm().clamp_min(1e-3)
                assert (mine.grad - theirs.grad).norm() / scale < 2e-2, (key, call)
    for mine, theirs in zip(eager.network.buffers(), replayed.network.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_recording_draws_anew_each_time(factored, images, labels):
    step = Stepper(BP(), factored("vit"), images, labels)  # with dropout
    recorded = RecordedStep(step, (step.network, step.state))
    logits = [recorded(step.x, step.y).logits.clone() for _ in range(WARM_UP + 3)]
    assert all(not torch.equal(a, b) for a, b in zip(logits, logits[1:], strict=False))


def test_a_recording_with_a_teacher_looked_through(dense, factored, images, labels):
    rule = SSA(lookahead=2, boundaries="units")
    teacher, network = dense("resnet20"), factored("resnet20")
    eager, replayed = (Stepper(rule, network, images, labels, teacher=teacher) for _ in range(2))
    recorded = RecordedStep(replayed, (replayed.network, replayed.state))
    for _ in range(WARM_UP + 2):
        expected, found = eager().per_block, recorded(replayed.x, replayed.y).per_block
        for name, loss in expected.items():
            torch.testing.assert_close(found[name], loss, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_digits_are_learned(precision, cuda_graph, digits):
    network = small()
    asked = settings(precision=precision, cuda_graph=cuda_graph, epochs=6)
    history = train_local(network, digits, settings=asked)
    assert history.records[-1]["test_accuracy"] > 0.75  # 0.81 on the CPU
    assert Manifold(network).departure() < 1e-2
    assert evaluate(network, digits.test, device="cpu").accuracy > 0.75


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_recorded_training_is_the_same_training(optimizer, digits):
    asked = {"epochs": 2, "clip": 1.0, "optimizer": optimizer}
    runs = [
        train_local(small(), digits, settings=settings(cuda_graph=on, **asked))
        for on in (True, False)
    ]
    first, second = ([r["loss"] for r in run.records] for run in runs)
    assert first == pytest.approx(second, rel=2e-2)


def test_ranks_fall_and_parts_accumulate_while_recorded(digits):
    network = small()
    before = {name: layer.rank for name, layer in factored_layers(network).items()}
    asked = settings(ranks=RankSchedule(final="0.25"), accumulate=2, epochs=6)
    history = train_local(network, digits, settings=asked)
    after = {name: layer.rank for name, layer in factored_layers(network).items()}
    assert all(after[name] <= rank for name, rank in before.items())
    assert sum(after.values()) < sum(before.values())
    assert history.records[-1]["test_accuracy"] > 0.6


def test_a_resumed_run_goes_on_as_the_other_did(digits, tmp_path):
    whole = small(dropout=0.2)
    expected = train_local(whole, digits, settings=settings(deterministic=True))
    resumed = small(dropout=0.2)

    def stop(now):
        if now.get("epoch_done") and now["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_local(
            resumed, digits, settings=settings(deterministic=True), out=tmp_path, progress=stop
        )
    found = train_local(
        small(dropout=0.2), digits, settings=settings(deterministic=True), out=tmp_path, resume=True
    )
    assert len(found.records) == 4
    for mine, theirs in zip(expected.records, found.records, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=5e-2)


def test_diagnostics_leave_recorded_training_as_it_is(digits):
    plain, looked = (
        train_local(small(), digits, settings=settings(diagnostics=every, epochs=2))
        for every in (0, 1)
    )
    assert len(looked.diagnostics) == 3
    last = list(looked.diagnostics[-1]["layers"].values())[-1]
    assert last["cosine"] > 0.99  # the output layer's gradient is backpropagation's
    assert last["departure"] < 1e-2
    assert looked.records[-1]["loss"] == pytest.approx(plain.records[-1]["loss"], rel=2e-2)


class _ReadsBack(nn.Module):
    """Its forward looks at a value on the host."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 48), nn.Linear(48, 10)

    def forward(self, x):
        h = torch.relu(self.body(x.flatten(1)))
        return self.head(h if h.sum().item() > 0 else -h)


def test_a_step_that_cannot_be_recorded_says_what_to_do(digits):
    with pytest.raises(StiefelError, match=r"can't be recorded as a CUDA graph.*cuda_graph false"):
        train_local(_ReadsBack(), digits, rule=BP(), settings=settings(epochs=1))
    assert torch.rand(3, device=CUDA).sum() > 0  # the generator draws again
    history = train_local(
        _ReadsBack(), digits, rule=BP(), settings=settings(epochs=2, cuda_graph=False)
    )
    assert history.records[-1]["test_accuracy"] > 0.5


def test_the_allocator_s_peak_does_not_grow_with_depth():
    peaks = {}
    for depth in (20, 56):
        dense = load(f"zoo:resnet{depth}")
        x, y = torch.randn(64, 3, 32, 32), torch.randint(5, (64,))
        network = convert(dense, plan(dense, "0.5"))
        for name, rule in {"bp": BP(), "local": SSA(memory=0)}.items():
            step = Stepper(rule, network, x, y)
            step()
            peaks[name, depth] = allocator_peak(step, CUDA)
    assert peaks["local", 56] < 1.2 * peaks["local", 20]
    assert peaks["bp", 56] > 2 * peaks["bp", 20]
    assert peaks["local", 56] < peaks["bp", 56] / 2  # libraries' workspaces are a part of it


def test_ranks_are_chosen_on_the_gpu_as_on_the_cpu():
    torch.manual_seed(0)
    dense = load("zoo:smallconv").eval()
    plans = [plan(dense, "energy=0.9", device=device) for device in ("cpu", CUDA)]
    here, there = ([layer.rank for layer in planned.layers] for planned in plans)
    assert any(here)
    assert all(abs((a or 0) - (b or 0)) <= 1 for a, b in zip(here, there, strict=True))


def test_decomposition_and_calibration_on_the_gpu_agree_with_the_cpu():
    torch.manual_seed(0)
    dense = load("zoo:smallconv").eval()
    x = torch.randn(64, 3, 32, 32)
    planned = plan(dense, "params=0.5")
    outputs = [
        convert(dense, planned, calibration=x, device=device).eval()(x) for device in ("cpu", CUDA)
    ]
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert error < 2e-2


class _Skips(nn.Module):
    """Now and then, and at first, it leaves a layer out, by a number drawn on the host."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.steps = nn.Linear(64, 64), nn.Linear(64, 10), 0

    def forward(self, x):
        x = x.flatten(1)
        self.steps += self.training
        if self.training and (random.random() < 0.5 or self.steps < 6):
            return self.head(x)
        return self.head(torch.relu(self.body(x)))


def test_what_draws_on_the_host_is_drawn_anew_each_step(digits):
    moved = []
    for cuda_graph in (True, False):
        torch.manual_seed(0)
        random.seed(0)
        network = _Skips()
        before = network.body.weight.detach().clone()
        asked = settings(epochs=2, cuda_graph=cuda_graph)
        train_local(network, digits, rule=BP(), settings=asked)
        moved.append(network.body.weight.detach() - before)
    assert moved[0].norm() > 0.1
    torch.testing.assert_close(*moved, rtol=1e-2, atol=1e-3)
