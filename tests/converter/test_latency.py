"""Latency prices and budgets by a clock of our own: what is timed, and what is believed of it."""

import itertools
import re

import pytest
import torch
from torch import nn

from converter import latency
from converter.convert import plan
from converter.cost import layer_calls
from converter.errors import StiefelError
from converter.layers import find_layers, prepared
from converter.rank_plan import RankPlan


@pytest.fixture
def timed(monkeypatch):
    """Prices of two equal layers and one of another shape; and how often something was timed."""
    runs = []

    def timed_rounds(calls, device, least_seconds=0.0, least_rounds=1):
        runs.append(len(calls))
        return [[1.0 for _ in calls]]

    monkeypatch.setattr(latency, "timed_rounds", timed_rounds)
    model = prepared(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 80)))
    example = torch.randn(3, 64)
    prices = latency.LatencyPrices(model, example, layer_calls(model, example, 3))
    runs.clear()
    return prices, find_layers(model), runs


def test_equal_layers_are_timed_once_and_answers_are_kept(timed):
    prices, layers, runs = timed
    for layer in (*layers, *layers):
        assert prices.current(layer) == 1.0
        assert prices.factored(layer, None, 8) == 1.0
    assert len(runs) == 4, "two shapes, dense and at one rank"


def test_a_plan_is_judged_by_the_median_of_its_rounds_and_a_layer_by_its_fastest(
    timed, monkeypatch
):
    """Dense and factored drift together, and one round went wrong: none of it is the plan's."""
    prices, layers, _ = timed
    rounds = [[1.0, 0.5], [2.0, 1.1], [3.0, 1.5], [1.5, 9.0], [1.0, 0.4]]
    monkeypatch.setattr(latency, "timed_rounds", lambda *_: rounds)
    assert prices.measured({layers[0].name: (None, 8)}) == 0.5
    monkeypatch.setattr(latency, "timed_rounds", lambda *_: [[2.0], [1.0], [7.0]])
    assert prices.factored(layers[0], None, 24) == 1.0


def test_ranks_on_offer_suit_the_device_and_save_parameters(timed):
    prices, layers, _ = timed
    offered = prices.ranks(layers[0], None)
    assert offered[0] == 8
    assert all(rank % 8 == 0 and rank <= layers[0].worthwhile_rank(None) for rank in offered)
    assert offered == sorted(set(offered))


class Scripted(latency.LatencyPrices):
    """Time goes with parameters; of what layers save the model saves `gain` times, give or take."""

    gain, luck, found = 1.0, itertools.repeat(1.0), ()

    def __init__(self, model, example, calls):
        self.layers = {layer.name: layer for layer in find_layers(model)}
        self.device = example.device
        self.whole = sum(map(self.current, self.layers.values()))
        type(self).found = []

    def current(self, layer):
        return float(layer.weight_parameters)

    def factored(self, layer, scheme, rank):
        return float(rank * sum(layer.weight_shape))

    def measured(self, chosen):
        spent = sum(
            self.factored(layer, *chosen[name]) if name in chosen else self.current(layer)
            for name, layer in self.layers.items()
        )
        self.found.append((1 - self.gain * (1 - spent / self.whole)) * next(self.luck))
        return self.found[-1]


@pytest.fixture
def budget(monkeypatch):
    """Plans eight layers for latency=0.5 with prices of the given gain and luck."""

    def planned(gain, luck):
        class Prices(Scripted):
            pass

        Prices.gain, Prices.luck = gain, itertools.cycle(luck)
        monkeypatch.setattr("converter.planning.LatencyPrices", Prices)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(8)))
        made = plan(model, "latency=0.5", example=torch.zeros(1, 128))
        kept = made.factored_parameters / made.dense_parameters
        return 1 - gain * (1 - kept), made, Prices.found

    return planned


@pytest.mark.parametrize("gain", [0.65, 1.0, 1.3])
@pytest.mark.parametrize("luck", [(1.0,), (0.97, 1.04, 1.0), (1.05, 0.95, 0.99, 1.03)])
def test_a_latency_budget_is_met_in_truth(budget, gain, luck):
    """The sum of layers and each measurement are wrong by some per cent."""
    truth, _, _ = budget(gain, luck)
    assert truth == pytest.approx(0.5, rel=0.1)


def test_a_plan_that_met_the_budget_by_luck_is_timed_again(budget):
    """The first plan takes 0.65, and seems to take 0.51."""
    truth, made, found = budget(0.7, (0.78, *[1.0] * 9))
    assert found[0] == pytest.approx(0.5, abs=0.02)
    assert found[1] == pytest.approx(0.65, abs=0.02)
    assert truth == pytest.approx(0.5, rel=0.05)
    assert made.factored_latency_ms / made.dense_latency_ms == found[-1]
    assert RankPlan.from_json(made.to_json()) == made.without_spectra()


def test_a_budget_out_of_reach_says_what_is_possible(budget):
    with pytest.raises(StiefelError) as caught:
        budget(0.3, (1.0,))
    fastest = float(re.fullmatch(r".*the fastest plan took latency=(.*)", str(caught.value))[1])
    assert 0.7 < fastest < 0.8
