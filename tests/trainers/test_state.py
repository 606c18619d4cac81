"""What a run keeps on disk: whole or not at all, and its own."""

import copy
import json

import pytest
import torch
from torch import nn

from converter.convert import convert, plan
from converter.errors import StiefelError
from tests.trainers.interrupting import InterruptAt, network, settings
from trainers.rank_schedule import RankSchedule
from trainers.state import RunFolder
from trainers.trainer import train_local


def test_a_finished_run_stays_until_another_has_an_epoch_to_show(data, tmp_path):
    rest = {"settings": settings(epochs=1, diagnostics=1), "out": tmp_path}
    train_local(network(), data, **rest)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        StiefelError, match=r"became nan by step \d of epoch 1; train anew, in another"
    ):
        train_local(network(), data, settings=settings(lr=1e30), out=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    train_local(network(), data, settings=settings(epochs=1), out=tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == before.keys() - {"diagnostics.jsonl"}


def test_the_log_is_json_even_where_a_figure_is_not_finite(data, tmp_path):
    broken = network()
    train_local(broken, data, settings=settings(epochs=1), out=tmp_path)
    kept = RunFolder(tmp_path)
    record = {"epoch": 1, "test_loss": float("nan"), "loss": float("inf")}
    rest = {"rule_settings": {"name": "bp"}, "looks": [], "network": {}}
    kept.write(broken, {"records": [record], **rest}, best=False)
    found = json.loads(kept.log.read_text(), parse_constant=pytest.fail)
    assert found == {"epoch": 1, "test_loss": None, "loss": None}


def test_a_disk_that_fills_up_in_the_state_is_one_clear_error(data, tmp_path, monkeypatch):
    def full(*arguments):
        raise RuntimeError("[enforce fail at inline_container.cc] file write failed\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StiefelError, match=r"cannot write .*state\.pt: .*file write failed$"):
        train_local(network(), data, settings=settings(epochs=1), out=tmp_path)
    assert not [path for path in tmp_path.iterdir() if "state.pt" in path.name]


def test_the_state_of_an_earlier_version_is_refused_in_one_line(interrupted, data):
    kept = torch.load(interrupted / "state.pt")
    del kept["materials"]
    torch.save({**kept, "format": "stiefel training state 3"}, interrupted / "state.pt")
    with pytest.raises(StiefelError, match="is no training state of this version"):
        train_local(network(), data, settings=settings(), out=interrupted, resume=True)


def test_an_interrupted_run_is_not_thrown_away_by_starting_anew(interrupted, data):
    before = (interrupted / "state.pt").read_bytes()
    with pytest.raises(StiefelError, match="holds an interrupted run; resume it"):
        train_local(network(), data, settings=settings(), out=interrupted)
    assert (interrupted / "state.pt").read_bytes() == before


def test_a_missing_or_damaged_state_is_one_clear_error(interrupted, data, tmp_path):
    with pytest.raises(StiefelError, match="nothing to resume: there is no"):
        train_local(network(), data, settings=settings(), out=tmp_path / "other", resume=True)
    state = interrupted / "state.pt"
    state.write_bytes(state.read_bytes()[:-1000])
    with pytest.raises(StiefelError, match="is damaged"):
        train_local(network(), data, settings=settings(), out=interrupted, resume=True)


def test_a_folder_that_cannot_be_made_is_one_clear_error(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StiefelError, match="cannot use .*file.run"):
        train_local(network(), data, settings=settings(), out=tmp_path / "file" / "run")


def test_a_disk_that_fills_up_leaves_the_earlier_epoch_whole(data, tmp_path, monkeypatch):
    import trainers.state

    saves = []

    def full(state, path):
        saves.append(path)
        if len(saves) > 1:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        torch_save(state, path)

    torch_save = torch.save
    monkeypatch.setattr(trainers.state.torch, "save", full)
    with pytest.raises(StiefelError, match="No space left on device"):
        train_local(network(), data, settings=settings(), out=tmp_path)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["epoch"] == 2
    assert not list(tmp_path.glob(".*"))


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(64, 64)
        self.steps, self.head = nn.ModuleList([layer, layer]), nn.Linear(64, 10)

    def forward(self, x):
        h = x.flatten(1)
        for step in self.steps:
            h = torch.relu(step(h))
        return self.head(h)


def test_a_module_under_two_names_resumes_after_its_rank_has_fallen(data, tmp_path):
    begun = convert(Twice(), plan(Twice(), 8))
    whole, stopped, resumed = (copy.deepcopy(begun) for _ in range(3))
    chosen = settings(ranks=RankSchedule(final="4", start=2, end=2, floor=2))
    train_local(whole, data, settings=chosen)
    train_local(stopped, data, settings=chosen, out=tmp_path, progress=InterruptAt(2, 2))
    train_local(resumed, data, settings=chosen, out=tmp_path, resume=True)
    expected = whole.state_dict()
    assert expected["steps.1.S"].shape == (4,)
    for key, value in resumed.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0, msg=key)
