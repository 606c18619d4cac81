"""Latency prices by a clock of our own: each layer and rank timed once, ranks in multiples."""

import pytest
import torch
from torch import nn

from converter import latency
from converter.cost import layer_calls
from converter.layers import find_layers, prepared


@pytest.fixture
def timed(monkeypatch):
    """Prices of two equal layers and one of another shape; and how often something was timed."""
    runs = []

    def seconds(calls, device, least_seconds=0.0):
        runs.append(len(calls))
        return [1.0 for _ in calls]

    monkeypatch.setattr(latency, "seconds", seconds)
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


def test_ranks_on_offer_suit_the_device_and_save_parameters(timed):
    prices, layers, _ = timed
    offered = prices.ranks(layers[0], None)
    assert offered[0] == 8
    assert all(rank % 8 == 0 and rank <= layers[0].worthwhile_rank(None) for rank in offered)
    assert offered == sorted(set(offered))
