import json
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.data import Dataset

from converter.checkpoints import load_any
from converter.convert import convert, plan
from converter.errors import StiefelError
from converter.factors import factored_layers
from converter.models import load
from tests.trainers.networks import digits_network as network
from trainers import loop
from trainers.data import Data, load_data
from trainers.distributed import World
from trainers.evaluate import evaluate
from trainers.manifold import SMALLEST_S, Manifold
from trainers.meter import Meter
from trainers.optim import build_optimizer, learning_rate, split_parameters
from trainers.randomness import host_state
from trainers.rank_schedule import RankSchedule
from trainers.rules import BP, DFA, SSA, StepResult
from trainers.trainer import TrainSettings, train_local


class Images(Dataset):
    """A data set of somebody's own: random images (C, H, W) and the labels given."""

    def __init__(self, labels, shape=(1, 8, 8)):
        self.targets = list(labels)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(len(self.targets), *shape, generator=generator)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


class Secretive(Dataset):
    """Doesn't tell its labels but with the images."""

    def __init__(self, labels):
        self.held = Images(labels)

    def __len__(self):
        return len(self.held)

    def __getitem__(self, index):
        return self.held[index]


class Ragged(Secretive):
    """Its images are of two sizes."""

    def __getitem__(self, index):
        image, label = self.held[index]
        return image[:, : 7 + label % 2], label


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data("digits", limit_train=96, limit_test=40)


def own(train, test=None, classes=10) -> Data:
    test = Images(range(classes)) if test is None else test
    return Data(train, test, tuple(map(str, range(classes))), "own")


def settings(**changes) -> TrainSettings:
    plain = {"epochs": 2, "batch_size": 16, "device": "cpu"}
    return TrainSettings(**{**plain, **changes})


# What training comes to


def test_the_digits_are_learned_by_backprop_and_locally_from_there():
    digits = load_data("digits", limit_train=700)
    dense = load("zoo:digits")
    quick = settings(epochs=4, batch_size=32)
    assert train_local(dense, digits, rule=BP(), settings=quick).best_accuracy > 0.93
    small = convert(dense, plan(dense, "params=0.3"))
    before = evaluate(small, digits.test).accuracy
    history = train_local(small, digits, rule=SSA(), teacher=dense, settings=quick)
    assert history.best_accuracy > max(0.9, before + 0.1)
    assert evaluate(small, digits.test).accuracy == history.records[-1]["test_accuracy"]


def test_backprop_in_the_trainer_is_torch_s_own_loop_step_by_step():
    torch.manual_seed(0)
    ours, plain = network(factored=False), network(factored=False)
    labels = [i % 10 for i in range(32)]
    chosen = settings(
        epochs=1, batch_size=32, optimizer="sgd", lr=0.1, warmup=0, weight_decay=0.01, accumulate=1
    )
    train = Images(labels)
    train_local(ours, own(train), rule=BP(), settings=chosen)
    decayed, rest = split_parameters(plain)
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(plain.train()(train.images), torch.tensor(labels)).backward()
    optimizer.step()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rule", [BP(), SSA(), DFA()])
def test_gradients_of_before_are_no_part_of_the_first_step(data, rule):
    fresh, used = network(), network()
    used.eval()(torch.randn(4, 1, 8, 8)).sum().backward()
    for model in (fresh, used):
        chosen = settings(epochs=1, batch_size=96, optimizer="sgd", lr=0.1)
        train_local(model, data, rule=rule, settings=chosen)
    assert all(map(torch.equal, fresh.parameters(), used.parameters()))


@pytest.mark.parametrize("rule", [BP(), SSA(similarity=0.0, readout_layers=0), DFA()])
def test_accumulated_parts_make_the_same_step_as_the_whole_batch(rule):
    # Without batch statistics, of which each part has its own, those of hidden layers too.
    results = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        dense = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(384, 10),
        )
        model = convert(dense, plan(dense, "0.4"))
        chosen = settings(
            optimizer="sgd", lr=0.05, accumulate=accumulate, epochs=1, retract_every=1
        )
        train_local(model, own(Images([i % 10 for i in range(48)])), rule=rule, settings=chosen)
        results.append(list(model.parameters()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_the_same_seed_repeats_and_another_does_not(data):
    def final(seed: int) -> torch.Tensor:
        model = network()
        train_local(model, data, settings=settings(seed=seed, epochs=1))
        return torch.cat([p.flatten() for p in model.parameters()])

    first = final(0)
    torch.rand(3)
    assert torch.equal(first, final(0))
    assert not torch.equal(first, final(1))


@pytest.mark.parametrize("retraction", ["newton-schulz", "qr", "polar"])
def test_factors_stay_on_the_manifold_and_s_stays_positive(data, retraction):
    model = network()
    chosen = settings(epochs=3, lr=0.02, retract_every=1, retraction=retraction)
    train_local(model, data, settings=chosen)
    assert Manifold(model).departure() < 0.05
    assert min(m.S.min().item() for m in factored_layers(model).values()) >= 0.99 * SMALLEST_S


def test_without_retraction_factors_leave_the_manifold(data):
    model = network()
    train_local(model, data, settings=settings(epochs=3, lr=0.02, retract_every=0))
    assert Manifold(model).departure() > 0.1


def test_ranks_fall_to_the_target_and_the_records_tell(data):
    model = network()
    schedule = RankSchedule(final="0.2", start=2, end=4, floor=1)
    history = train_local(model, data, settings=settings(epochs=4, ranks=schedule))
    told = [record["ranks"] for record in history.records]
    assert told[-1] == {n: m.rank for n, m in factored_layers(model).items()}
    assert told[-1] == {n: round(0.2 * m.full_rank) for n, m in factored_layers(model).items()}
    assert all(a[n] >= b[n] for a, b in zip(told, told[1:], strict=False) for n in a)
    parameters = [record["parameters"] for record in history.records]
    assert sorted(set(parameters), reverse=True) == parameters
    assert history.records[-1]["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_frozen_batch_norm_keeps_its_statistics(data):
    model = network()
    before = model[1].running_mean.clone()
    train_local(model, data, settings=settings(epochs=1, batch_norm="frozen"))
    assert torch.equal(model[1].running_mean, before)
    train_local(model, data, settings=settings(epochs=1))
    assert not torch.equal(model[1].running_mean, before)


def test_early_stop_ends_after_patience_without_a_better_accuracy(data):
    # A rate of next to nothing: the first epoch stays the best.
    history = train_local(network(), data, settings=settings(epochs=9, lr=1e-12, early_stop=2))
    assert len(history.records) == 3
    assert not history.interrupted


def test_early_stop_waits_until_ranks_fall_no_more(data):
    slow = {"lr": 1e-12, "early_stop": 2, "epochs": 9}
    schedule = RankSchedule(final="0.2", start=2, end=5, floor=1)
    history = train_local(network(), data, settings=settings(ranks=schedule, **slow))
    assert len(history.records) == 7  # the fifth has the final ranks, and two are no better
    assert max(history.records[-1]["ranks"].values()) < max(history.records[0]["ranks"].values())


def test_what_lower_ranks_lose_is_no_reason_to_stop(data, monkeypatch):
    found = iter([0.5, 0.8, 0.9, 0.9, 0.4, 0.5, 0.6, 0.7, 0.7, 0.7, 0.9])
    monkeypatch.setattr(loop.Training, "_evaluate", lambda self: (next(found), 1.0))
    schedule = RankSchedule(final="0.2", start=5, end=5, floor=1)
    history = train_local(
        network(), data, settings=settings(ranks=schedule, epochs=11, early_stop=2, lr=1e-12)
    )
    assert len(history.records) == 10
    assert history.best_accuracy == 0.9


class _Blank(Dataset):
    """Images without a number in them."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.full((1, 8, 8), float("nan")), index % 10


def test_a_test_loss_that_is_no_number_stops_the_run(data, tmp_path):
    blank = replace(data, test=_Blank())
    says = "the test loss became nan, though the weights are finite: .*; the epoch's training is"
    with pytest.raises(StiefelError, match=says):
        train_local(network(), blank, settings=settings(), out=tmp_path)
    history = train_local(network(), data, settings=settings(), out=tmp_path, resume=True)
    assert [record["epoch"] for record in history.records] == [1, 2]


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


def test_best_and_last_checkpoints_hold_what_the_history_says(data, tmp_path):
    dense = load("zoo:digits")
    model = convert(dense, plan(dense, "0.4"))
    history = train_local(model, data, settings=settings(epochs=3), out=tmp_path)
    accuracies = [record["test_accuracy"] for record in history.records]
    best, last = (load_any(tmp_path / f"{name}.safetensors") for name in ("best", "last"))
    assert evaluate(best, data.test).accuracy == max(accuracies) == history.best_accuracy
    assert evaluate(last, data.test).accuracy == accuracies[-1]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history.records
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_model_keeps_its_modes_and_the_caller_his_random_state(data):
    model = network().train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    before = host_state()
    train_local(model, data, settings=settings(epochs=1))
    assert [m.training for m in model.modules()] == modes
    assert host_state() == before


def test_model_and_teacher_come_back_laid_out_as_they_were(data):
    model, teacher = network(), network(factored=False)
    train_local(
        model, data, settings=settings(epochs=1, memory_format="channels_last"), teacher=teacher
    )
    assert all(p.is_contiguous() for one in (model, teacher) for p in one.parameters())


def test_progress_tells_loss_accuracy_rank_speed_and_time_left(data):
    seen = []
    train_local(network(), data, settings=settings(log_every=2), progress=seen.append)
    steps = [now for now in seen if not now.get("epoch_done")]
    assert [(now["epoch"], now["step"]) for now in steps] == [
        (e, s) for e in (1, 2) for s in (2, 4, 6)
    ]
    assert all(now["images_per_s"] > 0 and 0 <= now["accuracy"] <= 1 for now in steps)
    assert steps[-1]["eta_s"] == 0 < steps[0]["eta_s"]
    assert steps[0]["rank"] == pytest.approx(
        sum(m.rank for m in factored_layers(network()).values()) / 2
    )
    assert [now["epoch"] for now in seen if now.get("epoch_done")] == [1, 2]


# The optimizer and its rate


def test_weight_decay_spares_factors_norms_biases_and_read_outs(data):
    model = nn.Sequential(network(), nn.Linear(10, 10))
    optimizer = build_optimizer(model, nn.Linear(3, 3), settings(weight_decay=0.1))
    decayed = [p for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]]
    assert {id(p) for p in decayed} == {id(model[0][0].weight), id(model[1].weight)}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters())) + 2


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_over_the_warmup_and_falls_by_its_schedule(schedule):
    chosen = settings(lr=2.0, warmup=0.1, schedule=schedule)
    rates = [learning_rate(step, 100, chosen) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    middle = {"cosine": 1.0, "linear": 1.0, "constant": 2.0}[schedule]
    assert rates[55] == pytest.approx(middle)
    quarter = {"cosine": 1 + math.cos(math.pi / 6), "linear": 5 / 3, "constant": 2.0}[schedule]
    assert rates[25] == pytest.approx(quarter)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


# Bad input: one clear line each, nothing lost


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (own(Images([])), "own has no training images"),
        (own(Images(range(10)), Images([])), "own has no test images"),
        (own(Images([3] * 20)), "one class only"),
        (own(Images([0, 1, 2, 10])), "label 10 is outside the 10 classes 0 … 9"),
        (own(Images([0, 1, -1, 4])), "label -1 is outside"),
        (own(Images([0, 1]), Images([0, 12])), "own, test images: label 12 is outside"),
        (own(Images([0.5, 1.0])), "labels must be whole numbers"),
        (own(Secretive([0, 1, 2, 17] * 4)), "label 17 is outside the 10 classes"),
        (own(Secretive([3] * 20)), "one class only"),
        (own(Ragged(range(10))), "the data set failed: RuntimeError: stack expects"),
        (own(Images(range(10), (3, 8, 8))), "can't take images 3x8x8"),
        (own(Images(range(10), (1, 16, 16))), "can't take images 1x16x16"),
        (own(Images(range(12)), classes=12), "12 classes, the network tells 10 apart"),
    ],
)
def test_bad_data_is_one_clear_error(given, says, tmp_path):
    with pytest.raises(StiefelError, match=says) as caught:
        train_local(network(), given, settings=settings(batch_size=2), out=tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_images_that_do_not_fit_the_model_s_own_specification_are_named():
    model = convert(dense := load("zoo:digits"), plan(dense, "0.4"))
    with pytest.raises(StiefelError, match="own has images 3x8x8, zoo:digits 1x8x8"):
        train_local(model, own(Images(range(10), (3, 8, 8))), settings=settings(batch_size=2))


def test_a_model_without_factored_layers_is_no_matter_for_ssa(data):
    with pytest.raises(StiefelError, match="no factored layer to train with rule ssa"):
        train_local(network(factored=False), data, rule=SSA(), settings=settings())


def test_a_batch_of_one_is_too_small_for_batch_norm_unless_frozen(data):
    for batch_norm in ("train", "sync"):
        alone = settings(batch_size=4, accumulate=4, batch_norm=batch_norm)
        with pytest.raises(StiefelError, match=r"too small for batch norm \(1\)"):
            train_local(network(), data, settings=alone)
    frozen = settings(batch_size=4, accumulate=4, batch_norm="frozen", epochs=1)
    train_local(network(), data, rule=BP(), settings=frozen)


def test_a_batch_that_cannot_be_split_evenly_is_refused(data):
    with pytest.raises(StiefelError, match="can't be split into 3 equal parts"):
        train_local(network(), data, settings=settings(accumulate=3))


def test_a_rank_schedule_that_would_raise_a_rank_is_refused_before_training(data, tmp_path):
    with pytest.raises(StiefelError, match="a schedule only lowers ranks"):
        train_local(
            network(), data, settings=settings(ranks=RankSchedule(final=30)), out=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_cuda_where_there_is_none_is_refused(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StiefelError, match="no CUDA device; use device cpu"):
        train_local(network(), data, settings=settings(device="cuda"))


def test_a_misspelt_setting_is_refused():
    with pytest.raises(ValidationError, match="learning_rate"):
        TrainSettings(learning_rate=0.1)


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
