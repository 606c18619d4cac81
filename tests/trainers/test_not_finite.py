"""What is no number stops a run, names where it began, and is never kept."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import Dataset

from converter.errors import StiefelError
from tests.trainers.networks import digits_network as network
from tests.trainers.short import settings
from trainers.distributed import World
from trainers.meter import Meter
from trainers.rules import BP, SSA, StepResult
from trainers.trainer import train_local


class _Flat(Dataset):
    """Images of one value."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.full((1, 8, 8), self.value), index % 10


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (float("nan"), "the data set has images with values that are not finite"),
        (3e38, "the test loss became nan, though the weights are finite: .*"),
    ],
)
def test_a_test_loss_that_is_no_number_stops_the_run(value, says, data, tmp_path):
    blank = replace(data, test=_Flat(value))
    with pytest.raises(StiefelError, match=f"{says}; the epoch's training is kept"):
        train_local(network(), blank, settings=settings(), out=tmp_path)
    history = train_local(network(), data, settings=settings(), out=tmp_path, resume=True)
    assert [record["epoch"] for record in history.records] == [1, 2]


def test_training_images_that_are_no_numbers_are_told_of_as_such(data):
    blank = replace(data, train=_Flat(float("nan")))
    with pytest.raises(StiefelError, match="images with values that are not finite"):
        train_local(network(), blank, settings=settings())


@pytest.mark.parametrize(
    ("rule", "changes", "says"),
    [
        # A norm that is no number spoils every block's gradient, but only a step later.
        (SSA(), {"clip": 1.0}, "the loss of block 3 became nan"),
        (SSA(error="global"), {}, "the loss became nan"),
        (BP(), {}, "the loss became nan"),
    ],
    ids=["clipped", "global", "bp"],
)
def test_the_block_named_is_where_it_began(rule, changes, says, data):
    model = network()

    def poison(now):
        if (now["epoch"], now.get("step")) == (1, 1):
            model[3].S.data.fill_(float("nan"))

    rest = {"settings": settings(log_every=1, **changes), "progress": poison, "rule": rule}
    with pytest.raises(StiefelError, match=says):
        train_local(model, data, **rest)


def test_of_losses_that_are_no_number_the_first_in_time_is_told():
    meter = Meter(World())
    for first, second in [(1.0, 1.0), (1.0, float("nan")), (float("nan"), 1.0)]:
        blocks = {"a": torch.tensor(first), "b": torch.tensor(second)}
        loss = torch.tensor(second)
        meter.add(StepResult(loss, torch.eye(2), blocks), torch.tensor([0, 1]))
    reading = meter.read(False, lambda: 0.1)
    assert reading.nonfinite(local=True)[0] == "the loss of block b"
    assert reading.nonfinite(local=False)[0] == "the loss"
    assert (reading.lasted, reading.pace) == ({"a": 2.0, "b": 1.0}, pytest.approx(0.1))


def test_a_loss_that_explodes_stops_the_run_names_the_block_and_keeps_the_last_good(data, tmp_path):
    model = network()

    def poison(now):
        if now["epoch"] == 2 and now.get("step") == 2:
            model[3].S.data.fill_(float("nan"))

    with pytest.raises(StiefelError) as caught:
        train_local(
            model, data, rule=SSA(), out=tmp_path, progress=poison, settings=settings(log_every=1)
        )
    assert "the loss of block 3 became nan by step 3 of epoch 2" in str(caught.value)
    assert str(tmp_path / "last.safetensors") in str(caught.value)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["epoch"] == 2
    assert all(bool(t.isfinite().all()) for t in state["network"].values())


def test_weights_that_are_no_longer_finite_are_never_written(data, tmp_path):
    # The loss of the last step is fine; it is the update after it that ruins the weights.
    model = network()

    def poison(now):
        if now["epoch"] == 1 and now.get("step") == 6:
            model[3].U.data[0, 0] = float("inf")

    with pytest.raises(StiefelError, match="parameter 3.U became nan"):
        train_local(model, data, out=tmp_path, progress=poison, settings=settings(log_every=6))
    assert not list(tmp_path.iterdir())


def test_an_infinite_rate_of_backprop_is_noticed(data):
    with pytest.raises(StiefelError, match="became (nan|inf)"):
        train_local(network(), data, rule=BP(), settings=settings(lr=1e30, warmup=0))
