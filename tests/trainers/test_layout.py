"""Channels-last where a network takes it, contiguous where it does not."""

import copy

import pytest
import torch
from torch import nn

from converter.errors import StiefelError
from converter.models import load
from tests.trainers.short import settings
from trainers.data import load_data
from trainers.evaluate import evaluate
from trainers.layout import channels_last_in, lay_out
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


class Trained(Flattening):
    """Flattens by view in training alone, as some ways of dropping blocks do."""

    def forward(self, x):
        h = torch.relu(self.conv(x))
        return self.head(h.view(h.size(0), -1) if self.training else h.flatten(1))


class Backward(Flattening):
    """Flattens gradients by view."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.view(len(gradient), -1).view(gradient.shape)

    def forward(self, x):
        return self.head(self.second(self.Same.apply(torch.relu(self.conv(x)))).flatten(1))


class Strided(Flattening):
    """Reads maps as if they were contiguous, and says nothing where they are not."""

    def forward(self, x):
        h = torch.relu(self.conv(x))
        return self.head(h.as_strided((len(h), h[0].numel()), (h[0].numel(), 1)))


class Fussy(Flattening):
    """Has its own way of saying no."""

    def forward(self, x):
        h = torch.relu(self.conv(x))
        if not h.is_contiguous():
            raise TypeError("contiguous maps, please")
        return self.head(h.flatten(1))


class Tied(Flattening):
    """Two kernels in one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.once_more = nn.Conv2d(4, 4, 3, padding=1)
        self.once_more.weight.data = self.again.weight.data

    def forward(self, x):
        return self.head(self.once_more(self.again(self.conv(x))).flatten(1))


class Volumes(Flattening):
    """Weights of five axes, which have no channels-last form of four."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 3, padding=1)

    def forward(self, x):
        return self.head(self.conv(x[:, None]).flatten(1))


UNFIT = [Flattening, Trained, Backward, Strided, Fussy, Tied, Volumes]


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


@pytest.mark.parametrize("make", UNFIT)
def test_networks_that_cannot_take_it_stay_contiguous(make):
    other, network = load("zoo:smallconv"), make()
    x = torch.randn(2, 1, 8, 8)
    assert lay_out("auto", x, network) is torch.contiguous_format
    assert all(p.is_contiguous() for p in network.parameters())
    # One that can't decides for all that run together, a teacher for its student too.
    assert lay_out("auto", torch.randn(2, 3, 32, 32), other, network) is torch.contiguous_format
    assert not conv_is_last(other)


@pytest.mark.parametrize("make", [Flattening, Trained, Backward, Strided, Fussy])
def test_networks_that_take_contiguous_maps_alone_train_as_tested(make):
    digits = load_data("digits", limit_train=700)
    network = make()
    history = train_local(network, digits, rule=BP(), settings=settings(epochs=3, lr=0.01))
    assert history.best_accuracy > 0.8
    found = evaluate(network, digits.test).accuracy
    assert found == pytest.approx(history.records[-1]["test_accuracy"])


def test_trying_a_layout_leaves_no_trace():
    network, x = load("zoo:smallconv").train(), torch.randn(4, 3, 32, 32)
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    lay_out("auto", x, network)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in network.parameters())
    assert network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_kernels_in_one_memory_stay_there(data):
    network = Tied()
    train_local(network, data, rule=BP(), settings=settings(epochs=1))
    assert network.again.weight.data_ptr() == network.once_more.weight.data_ptr()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("asked", ["auto", "contiguous", "channels_last"])
def test_a_model_comes_back_laid_out_as_it_was(asked, layout, data):
    network = load("zoo:digits").to(memory_format=layout)
    before = channels_last_in(network)
    chosen = settings(epochs=1, memory_format=asked)
    train_local(network, data, rule=BP(), settings=chosen)
    assert channels_last_in(network) == before


def test_buffers_that_are_expanded_are_left_alone(data):
    network = load("zoo:digits")
    network.register_buffer("mask", torch.ones(1, 1, 8, 1).expand(1, 4, 8, 8))
    train_local(network, data, rule=BP(), settings=settings(epochs=1))
    assert torch.equal(network.mask, torch.ones(1, 4, 8, 8))


def test_weights_of_five_axes_are_no_channels_last_ones():
    with pytest.raises(StiefelError, match=r"'conv.weight' has five: use auto or contiguous"):
        lay_out("channels_last", torch.randn(2, 1, 8, 8), Volumes())
