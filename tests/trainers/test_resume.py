"""A run that was interrupted and resumed equals one that wasn't, bit for bit."""

import json
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from converter.checkpoints import load_factored
from converter.errors import StiefelError
from converter.factors import factored_layers
from tests.trainers.interrupting import InterruptAt, network, settings
from trainers.rank_schedule import RankSchedule
from trainers.rules import BP, SSA
from trainers.trainer import train_local

MOMENTARY = {"seconds", "images_per_s", "peak_memory_mib"}


def assert_same(one, other, path="state"):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - MOMENTARY:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}.{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


RUNS = {
    "ssa": (SSA(), {}),
    "ssa, of a sample": (SSA(sample=4), {}),
    "backprop with momentum, accumulated": (
        BP(),
        {"optimizer": "sgd", "lr": 0.05, "accumulate": 2, "clip": 1.0, "label_smoothing": 0.1},
    ),
    "falling ranks": (
        SSA(),
        {"ranks": RankSchedule(final="params=0.4", start=2, end=3, floor=2), "retraction": "qr"},
    ),
    "bf16": (BP(), {"precision": "bf16"}),
    "fp16": (BP(), {"precision": "fp16", "schedule": "linear"}),
}
PLACES = {
    "mid-epoch": (2, 3),
    "after the last step of an epoch": (2, 6),
    "after an epoch": (1, None),
    "in the first step": (1, 1),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    """The state that each kind of run ends with, made once."""
    kept = {}

    def final(name: str) -> dict:
        if name not in kept:
            out = tmp_path_factory.mktemp("whole")
            rule, changes = RUNS[name]
            train_local(network(), data, rule=rule, settings=settings(**changes), out=out)
            kept[name] = torch.load(out / "state.pt", weights_only=True)
        return kept[name]

    return final


@pytest.mark.parametrize(
    ("run", "place"),
    [
        ("ssa", "mid-epoch"),
        ("ssa", "after the last step of an epoch"),
        ("ssa", "after an epoch"),
        ("ssa", "in the first step"),
        ("backprop with momentum, accumulated", "mid-epoch"),
        ("falling ranks", "mid-epoch"),
        ("falling ranks", "after an epoch"),
        ("bf16", "mid-epoch"),
        ("fp16", "mid-epoch"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(run, place, uninterrupted, data, tmp_path):
    rule, changes = RUNS[run]
    rest = {"rule": rule, "settings": settings(**changes), "out": tmp_path}
    first = train_local(network(), data, progress=InterruptAt(*PLACES[place]), **rest)
    assert first.interrupted
    torch.rand(7)  # another process would be in another random state
    model = network()
    model.eval()(torch.randn(4, 1, 8, 8)).sum().backward()  # gradients that are not the run's
    second = train_local(model, data, resume=True, **rest)
    assert not second.interrupted
    assert [record["epoch"] for record in second.records] == [1, 2, 3]
    whole = uninterrupted(run)
    assert_same(whole, torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(dict(model.state_dict()), dict(whole["network"]))


class Flickering(Dataset):
    """Images that are brighter or darker each time, by numbers of Python's and of numpy's."""

    def __init__(self, held: Dataset) -> None:
        self.held = held

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.held[index]
        return image + random.random() + np.random.rand(), label


def test_what_a_data_set_draws_goes_on_as_well(data, tmp_path):
    found, flickering = [], replace(data, train=Flickering(data.train))
    for name, progress in [("whole", None), ("halved", InterruptAt(2, 3))]:
        rest = {"settings": settings(), "out": tmp_path / name}
        if train_local(network(), flickering, progress=progress, **rest).interrupted:
            random.random(), np.random.rand()
            train_local(network(), flickering, resume=True, **rest)
        found.append(torch.load(tmp_path / name / "state.pt", weights_only=True))
    assert_same(*found)


def test_a_run_that_was_killed_goes_on_from_its_last_epoch(uninterrupted, data, tmp_path):
    def die(now):
        if (now["epoch"], now.get("step")) == (3, 2):
            raise MemoryError

    with pytest.raises(MemoryError):
        train_local(network(), data, rule=SSA(), settings=settings(), out=tmp_path, progress=die)
    train_local(network(), data, rule=SSA(), settings=settings(), out=tmp_path, resume=True)
    assert_same(uninterrupted("ssa"), torch.load(tmp_path / "state.pt", weights_only=True))


def test_a_run_can_be_interrupted_again_and_again(uninterrupted, data, tmp_path):
    rest = {"rule": SSA(), "settings": settings(), "out": tmp_path}
    assert train_local(network(), data, progress=InterruptAt(1, 2), **rest).interrupted
    for place in [(1, 4), (2, 1), (3, 4)]:
        again = train_local(network(), data, progress=InterruptAt(*place), resume=True, **rest)
        assert again.interrupted
    train_local(network(), data, resume=True, **rest)
    assert_same(uninterrupted("ssa"), torch.load(tmp_path / "state.pt", weights_only=True))


def test_sigterm_keeps_a_checkpoint_of_the_step_in_hand_and_gives_the_handlers_back(data, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    model = network()
    stop = InterruptAt(2, 3, signal.SIGTERM)
    history = train_local(model, data, settings=settings(), out=tmp_path, progress=stop)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert history.interrupted
    assert len(history.records) == 1
    kept = load_factored(tmp_path / "last.safetensors", model=network(factored=False))
    assert_same(dict(kept.state_dict()), dict(model.state_dict()))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (state["epoch"], state["step"], state["finished"]) == (2, 4, False)


def test_the_log_holds_each_epoch_once_and_resuming_a_finished_run_trains_no_more(data, tmp_path):
    rest = {"settings": settings(), "out": tmp_path}
    train_local(network(), data, progress=InterruptAt(2, 3), **rest)
    train_local(network(), data, resume=True, **rest)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    before = (tmp_path / "state.pt").read_bytes()
    model = network()
    history = train_local(model, data, resume=True, **rest)
    assert [r["loss"] for r in history.records] == [line["loss"] for line in lines]
    assert (tmp_path / "state.pt").read_bytes() == before
    assert_same(dict(torch.load(tmp_path / "state.pt")["network"]), dict(model.state_dict()))


def test_ranks_of_a_resumed_model_are_those_it_had_fallen_to(data, tmp_path):
    rule, changes = RUNS["falling ranks"]
    rest = {"rule": rule, "settings": settings(**changes), "out": tmp_path}
    interrupted = network()
    train_local(interrupted, data, progress=InterruptAt(2, 1), **rest)
    ranks = {name: layer.rank for name, layer in factored_layers(interrupted).items()}
    assert ranks != {name: layer.rank for name, layer in factored_layers(network()).items()}
    model = network()
    train_local(model, data, resume=True, progress=InterruptAt(2, 3), **rest)
    assert {name: layer.rank for name, layer in factored_layers(model).items()} == ranks


def test_a_model_that_is_cut_otherwise_than_the_run_s_is_refused(data, tmp_path):
    rule, rest = SSA(boundaries="units"), {"settings": settings(), "out": tmp_path}
    train_local(network(), data, rule=rule, progress=InterruptAt(1, 2), **rest)
    kept = torch.load(tmp_path / "state.pt")
    del kept["state"]["feedback.0.0.B_S"]
    torch.save(kept, tmp_path / "state.pt")
    model = network()
    with pytest.raises(StiefelError, match="read-outs of other blocks than this model's: resume"):
        train_local(model, data, rule=rule, resume=True, **rest)
    assert_same(dict(model.state_dict()), dict(network().state_dict()))


class Torn(Dataset):
    """Test images of which one can't be read, until it is mended."""

    def __init__(self, held: Dataset) -> None:
        self.held, self.whole = held, False

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 17 and not self.whole:
            raise OSError("image 17 is torn")
        return self.held[index]


def test_an_epoch_whose_evaluation_fails_is_kept_and_needs_no_training_again(
    uninterrupted, data, tmp_path
):
    torn = Torn(data.test)
    rest = {"rule": SSA(), "settings": settings(), "out": tmp_path}
    with pytest.raises(StiefelError, match="image 17 is torn; the epoch's training is kept in"):
        train_local(network(), replace(data, test=torn), **rest)
    torn.whole, steps = True, []
    heard = {"progress": lambda now: steps.append((now["epoch"], now.get("step")))}
    train_local(network(), replace(data, test=torn), resume=True, **heard, **rest)
    assert steps[:2] == [(1, None), (2, 1)]
    assert_same(uninterrupted("ssa"), torch.load(tmp_path / "state.pt", weights_only=True))
