"""Two processes on one batch compute what one does, and the first alone writes.

Run as a script, this file is one of the two processes: it goes through all the runs and leaves what
became of each for the tests to look at.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from converter.convert import convert, plan
from converter.errors import StiefelError
from trainers import loop
from trainers.data import load_data
from trainers.distributed import World, synchronised_batch_norm
from trainers.rank_schedule import RankSchedule
from trainers.rules import BP, DFA, SSA
from trainers.trainer import TrainSettings, train_local

FALLING = RankSchedule(final="0.2", start=2, end=2, floor=2)
RUNS = {
    "bp": (BP(), {"clip": 1.0}),
    "ssa": (SSA(), {"ranks": FALLING, "retract_every": 2}),
    # At 0.05 this one and the taught ones multiply rounding by hundreds within two epochs.
    "ssa, all terms": (
        SSA(alpha=0.1, beta=0.1, cosine=0.1, hoyer=0.1),
        {"label_smoothing": 0.1, "lr": 0.02},
    ),
    "ssa, global": (SSA(error="global", similarity=1.0), {}),
    "ssa, of a sample": (SSA(sample=2), {}),
    "ssa, linear read-outs": (SSA(readout_layers=0), {}),
    "taught": (SSA(), {"lr": 0.02}),
    "taught, accumulated": (SSA(cross_entropy=1.0, similarity=4.0), {"accumulate": 2, "lr": 0.02}),
    "dfa": (DFA(storage="recomputed"), {"optimizer": "adamw", "lr": 1e-3}),
    "an image each": (BP(), {"batch_size": 2, "epochs": 1, "lr": 1e-3}),
    "looked at": (SSA(), {"ranks": FALLING, "retract_every": 2, "diagnostics": 1}),
}
# What each process draws or counts for itself, one process would draw and count otherwise.
OWN = {
    "own statistics": (SSA(), {"batch_norm": "train"}),
    "dropout": (SSA(), {"ranks": FALLING, "retract_every": 2}),
    "interrupted": (SSA(), {"ranks": FALLING, "retract_every": 2, "log_every": 50}),
    "interrupted, own statistics": (SSA(), {"batch_norm": "train", "log_every": 50}),
}


def dense(dropout: float = 0.0, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    # Without biases before batch norms: their gradients are noise, which Adam would blow up.
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(24, 24, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, 10),
    )


def train(name: str, out: Path | None, batch_norm: str = "sync", **options):
    rule, changes = {**RUNS, **OWN}[name]
    plain = {
        "epochs": 2,
        "batch_size": 24,
        "optimizer": "sgd",
        "lr": 0.05,
        "batch_norm": batch_norm,
    }
    chosen = {**plain, "device": "cpu", "log_every": 1, "warmup": 0, **changes}
    original = dense(0.3 if name in ("dropout", "interrupted") else 0.0)
    model = convert(original, plan(original, "0.4"))
    teacher = dense(seed=2) if "taught" in name else None
    data = load_data("digits", limit_train=72, limit_test=41)
    settings = TrainSettings(**chosen)
    rest = {"settings": settings, "teacher": teacher, "out": out}
    history = train_local(model, data, rule=rule, **rest, **options)
    return model.state_dict(), history


def one_of_two(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)

    def interrupt(now):
        # The first process alone is asked to stop, and both do.
        if (now["epoch"], now.get("step")) == (2, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    for name in (*RUNS, *OWN):
        out = folder / str(rank) / name
        if name.startswith("interrupted"):
            out = folder / f"both {name}"
            loop._STOP_SECONDS = 0.0  # or a step takes too little time for a look in between
            _, history = train(name, out, progress=interrupt)
            assert history.interrupted
            assert len(history.records) == 1
            dist.barrier()
            state, history = train(name, out, resume=True)
        else:
            state, history = train(name, out)
        torch.save({"state": state, "history": history.model_dump()}, folder / f"{name}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder where two processes left their runs."""
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    return folder


def left(folder: Path, name: str, rank: int) -> dict:
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=True)


def assert_close(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=2e-5, rtol=1e-4, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_where_one_does(name, two):
    state, history = train(name, None)
    ours = left(two, name, 0)
    assert_close(ours["state"], dict(state))
    for mine, theirs in zip(ours["history"]["records"], history.records, strict=True):
        for key in ("loss", "test_loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)
        assert mine["ranks"] == theirs["ranks"]
        for key in ("train_accuracy", "test_accuracy"):
            assert mine[key] == pytest.approx(theirs[key], abs=1 / 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RUNS, *OWN])
def test_both_processes_hold_the_same_weights_and_figures(name, two):
    first, second = left(two, name, 0), left(two, name, 1)
    assert all(torch.equal(first["state"][key], second["state"][key]) for key in first["state"])
    for mine, theirs in zip(*(x["history"]["records"] for x in (first, second)), strict=True):
        for key in ("loss", "test_accuracy", "test_loss", "ranks"):
            assert mine[key] == theirs[key]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "names",
    [("dropout", "interrupted"), ("own statistics", "interrupted, own statistics")],
    ids=["dropout", "own statistics"],
)
def test_a_resumed_run_of_two_equals_an_uninterrupted_one(names, rank, two):
    whole, resumed = (left(two, name, rank) for name in names)
    assert all(torch.equal(whole["state"][key], resumed["state"][key]) for key in whole["state"])
    for mine, theirs in zip(*(x["history"]["records"] for x in (whole, resumed)), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-12)
        assert mine["train_accuracy"] == theirs["train_accuracy"]


@pytest.mark.slow
def test_the_first_process_alone_writes(two):
    assert sorted(path.name for path in (two / "0").iterdir()) == sorted(
        name for name in {*RUNS, *OWN} if not name.startswith("interrupted")
    )
    assert not (two / "1").exists()
    log = (two / "0" / "bp" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1, 2]


@pytest.mark.slow
def test_diagnostics_change_nothing_there_either(two):
    plain, looked = left(two, "ssa", 0), left(two, "looked at", 0)
    assert all(torch.equal(plain["state"][key], looked["state"][key]) for key in plain["state"])
    _, history = train("looked at", None)
    for mine, theirs in zip(looked["history"]["diagnostics"], history.diagnostics, strict=True):
        assert mine["epoch"] == theirs["epoch"]
        for name, layer in theirs["layers"].items():
            assert mine["layers"][name]["rank" if "rank" in layer else "cosine"] is not None


@pytest.mark.slow
def test_torchrun_trains_and_one_checkpoint_comes_of_it(tmp_path):
    def stiefel(*words: str, processes: int = 1) -> subprocess.CompletedProcess:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launcher = [*torchrun, str(processes)] if processes > 1 else []
        command = [sys.executable, *launcher, "-m", "stiefel", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )

    made = stiefel("convert", "--model", "zoo:digits", "--rank", "0.5", "-o", "small.safetensors")
    assert made.returncode == 0, made.stderr
    words = ("train-local", "small.safetensors", "--data", "digits", "--limit-train", "200")
    rest = ("--epochs", "1", "--device", "cpu", "-o", "trained.safetensors")
    done = stiefel(*words, *rest, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote trained.safetensors") == 1
    assert done.stderr.count("epoch   1/1") == 1
    assert (tmp_path / "trained.safetensors").is_file()

    # What is wrong in one process is told by it, and no traceback of the other's hides it.
    (tmp_path / "torn.py").write_text(TORN)
    words = ("train-local", "small.safetensors", "--data", "torn.py:made", "-o", "b.safetensors")
    torn = stiefel(*words, "--batch-size", "8", "--device", "cpu", processes=2)
    assert torn.returncode != 0
    assert "stiefel: the data set failed: OSError: page 13 is torn" in torn.stderr
    assert "stiefel: another process has ended: it says why" in torn.stderr
    assert 'site-packages/torch/distributed/distributed_c10d.py"' not in torn.stderr
    assert not (tmp_path / "b.safetensors").exists()


TORN = """
import torch

class Torn(torch.utils.data.Dataset):
    targets = [0, 1] * 8

    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index == 13:
            raise OSError("page 13 is torn")
        return torch.randn(1, 8, 8), self.targets[index]

def made():
    whole = Torn()
    return whole, torch.utils.data.Subset(whole, range(8)), [str(i) for i in range(10)]
"""


def test_one_process_alone_has_nothing_to_synchronise(tmp_path):
    alone, _ = train("bp", None)
    plain, _ = train("bp", tmp_path, batch_norm="train")
    assert all(torch.equal(alone[key], plain[key]) for key in alone)


def test_a_batch_norm_of_somebody_s_own_is_not_synchronised_blindly():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    sync = synchronised_batch_norm(World(0, 2), nn.Sequential(Odd(3)))
    with pytest.raises(StiefelError, match="does not know 0's Odd; use train or frozen"):
        sync.__enter__()


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), Path(sys.argv[2]))
