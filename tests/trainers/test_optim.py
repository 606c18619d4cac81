"""Which parameters decay, and the rate's way up and down."""

import math

import pytest
from torch import nn

from tests.trainers.networks import digits_network as network
from tests.trainers.short import settings
from trainers.optim import build_optimizer, learning_rate


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
