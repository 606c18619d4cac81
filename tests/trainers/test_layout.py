"""Channels-last where a network takes it, contiguous where it does not."""

import pytest
import torch
from torch import nn

from converter.models import load
from tests.trainers.short import settings
from trainers.data import load_data
from trainers.layout import lay_out
from trainers.rules import BP
from trainers.trainer import train_local


class Flattening(nn.Module):
    """A small network that flattens its maps as most tutorials do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4 * 8 * 8, 10)

    def forward(self, x):
        h = torch.relu(self.conv(x))
        return self.head(h.view(h.size(0), -1))


class Volumes(nn.Module):
    """Weights of five axes, which have no channels-last form of four."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)
        self.head = nn.Linear(2 * 8 * 8, 10)

    def forward(self, x):
        return self.head(self.conv(x[:, None]).flatten(1))


def conv_is_last(network: nn.Module) -> bool:
    weight = next(p for p in network.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
    return weight.is_contiguous(memory_format=torch.channels_last)


def test_convolutions_run_channels_last_by_default():
    network, x = load("zoo:smallconv"), torch.randn(4, 3, 32, 32)
    assert lay_out("auto", x, network) is torch.channels_last
    assert conv_is_last(network)
    assert network.features[0](x.contiguous(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("asked", ["contiguous", "channels_last"])
def test_what_is_asked_for_is_had(asked):
    network = load("zoo:smallconv")
    layout = lay_out(asked, torch.randn(2, 3, 32, 32), network)
    assert layout is (torch.channels_last if asked == "channels_last" else torch.contiguous_format)
    assert conv_is_last(network) is (asked == "channels_last")


@pytest.mark.parametrize("make", [Flattening, Volumes])
def test_networks_that_cannot_take_it_stay_contiguous(make):
    other, network = load("zoo:smallconv"), make()
    x = torch.randn(2, 1, 8, 8)
    assert lay_out("auto", x, network) is torch.contiguous_format
    assert all(p.is_contiguous() for p in network.parameters())
    # One that can't decides for all that run together, a teacher for its student too.
    assert lay_out("auto", torch.randn(2, 3, 32, 32), other, network) is torch.contiguous_format
    assert not conv_is_last(other)


def test_a_network_that_flattens_by_view_trains():
    digits = load_data("digits", limit_train=700)
    history = train_local(Flattening(), digits, rule=BP(), settings=settings(epochs=3, lr=0.01))
    assert history.best_accuracy > 0.8
