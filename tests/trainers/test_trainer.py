"""What training comes to, what it keeps and tells, and what it leaves as it was."""

import json

import pytest
import torch
from torch import nn

from converter.checkpoints import load_any
from converter.convert import convert, plan
from converter.errors import StiefelError
from converter.factors import factored_layers
from converter.models import load
from tests.trainers.networks import digits_network as network
from tests.trainers.short import Images, own, settings
from trainers import loop
from trainers.data import load_data
from trainers.evaluate import evaluate
from trainers.manifold import SMALLEST_S, Manifold
from trainers.optim import split_parameters
from trainers.randomness import host_state
from trainers.rank_schedule import RankSchedule
from trainers.rules import BP, DFA, SSA
from trainers.trainer import train_local


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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("rule", [SSA(), BP()], ids=lambda rule: rule.name)
def test_training_trains_whatever_mode_its_caller_is_in(mode, rule, data):
    plain, model = network(), network()
    train_local(plain, data, rule=rule, settings=settings())
    with mode():
        train_local(model, data, rule=rule, settings=settings())
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_epoch_ends_on_the_manifold_whenever_the_steps_between_retractions_end(data):
    model = network()
    steps = settings(lr=0.01, schedule="constant", retraction="qr", retract_every=1000)
    train_local(model, data, settings=steps)
    for layer in factored_layers(model).values():
        U, _, V = layer.factors()
        for factor in (U, V):
            eye = torch.eye(factor.shape[-1])
            torch.testing.assert_close(factor.mT @ factor, eye, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (nn.DataParallel, "wrapped in DataParallel: give what is inside, model.module"),
        (torch.compile, "wrapped in OptimizedModule: give what is inside, model._orig_mod"),
    ],
)
def test_a_wrapper_is_refused_by_what_to_give_instead(wrap, says, data):
    with pytest.raises(StiefelError, match=says):
        train_local(wrap(network()), data, settings=settings())


@pytest.mark.parametrize("rule", ["ssa", SSA])
def test_what_is_no_rule_is_refused(rule, data):
    with pytest.raises(StiefelError, match=r"is none: give SSA\(...\), DFA\(...\) or BP\(\)"):
        train_local(network(), data, rule=rule, settings=settings())
