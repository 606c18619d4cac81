"""Two networks side by side: every image passes every node once, in bounded memory."""

import copy

import pytest
import torch
from torch import nn

from converter import lockstep
from converter.calibration import Calibration
from converter.convert import convert, plan
from converter.flow import trace
from converter.lockstep import stations


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.once, self.twice = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.twice(self.once(self.twice(x)))


def shrinking_net() -> nn.Module:
    """Activations are large first, small later."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1, stride=4),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(128, 5),
    ).eval()


def graph_of(net, images):
    return trace(net, [], images).graph


@pytest.fixture
def images():
    return torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def walk(net, images, names, graph):
    return [
        (s.name, s.images, [*s.meetings()])
        for s in stations(net, copy.deepcopy(net), graph, names, images)
    ]


@pytest.mark.parametrize("traced", [True, False])
def test_stations_come_in_the_order_of_the_run_with_what_the_modules_get_and_give(traced, images):
    net, names = shrinking_net(), ["6", "0", "4", "2"]
    found = walk(net, images, names, graph_of(net, images) if traced else None)
    assert [name for name, *_ in found] == ["0", "2", "4", "6"]
    for name, count, meetings in found:
        assert count == sum(len(m.given) for m in meetings) == len(images)
        kept = []
        handle = net.get_submodule(name).register_forward_hook(
            lambda m, i, o, kept=kept: kept.extend([i[0].clone(), o])
        )
        with torch.no_grad():
            net(images)
        handle.remove()
        for get, want in (("input", kept[0]), ("given", kept[0])):
            torch.testing.assert_close(torch.cat([getattr(m, get) for m in meetings]), want)


def test_images_join_where_activations_have_become_small_enough(images, monkeypatch):
    net = shrinking_net()
    # Both networks' maps of the second node: 2 × (16 + 3) × 256 floats an image, at most.
    monkeypatch.setattr(lockstep, "ACTIVATIONS", 10 * 2 * 19 * 256 * 4)
    counts = {name: n for name, n, _ in walk(net, images, ["0", "2", "4", "6"], None)}
    assert counts == dict.fromkeys("0246", len(images))  # the whole network is one node here
    found = walk(net, images, ["0", "2", "4", "6"], graph_of(net, images))
    counts = {name: n for name, n, _ in found}
    assert 8 <= counts["0"] <= 12
    assert counts["0"] <= counts["2"] < counts["4"] <= counts["6"] == len(images)
    for _, count, meetings in found:
        starts = [m.start for m in meetings]
        assert starts == sorted(starts)
        assert sum(len(m.given) for m in meetings) == count


def test_every_image_passes_every_layer_once_in_both_networks(images, monkeypatch):
    net = shrinking_net()
    small, graph, passed = copy.deepcopy(net), graph_of(net, images), []
    for model in (net, small):
        for i in (0, 2, 4, 6):
            model[i].register_forward_hook(lambda m, x, y: passed.extend([id(m)] * len(y)))
    monkeypatch.setattr(lockstep, "ACTIVATIONS", 10 * 2 * 19 * 256 * 4)
    with torch.no_grad():
        for station in stations(net, small, graph, ["2", "6"], images):
            assert sum(len(m.given) for m in station.meetings()) == station.images
    # The trial run of two images is the dense network's.
    for model, extra in ((net, 2), (small, 0)):
        assert [passed.count(id(model[i])) for i in (0, 2, 4, 6)] == [len(images) + extra] * 4


def test_what_changes_at_a_station_is_what_later_ones_see(images):
    net = shrinking_net()
    small, given = copy.deepcopy(net), {}
    with torch.no_grad():
        for station in stations(net, small, graph_of(net, images), ["0", "6"], images):
            given[station.name] = torch.cat([m.given for m in station.meetings()])
            if station.name == "0":
                small[0].weight.zero_()
                small[0].bias.zero_()
    with torch.no_grad():
        want = small[:6](images)
    torch.testing.assert_close(given["6"], want)


def test_modules_that_run_twice_are_no_stations():
    net = Shared().eval()
    x = torch.randn(5, 4)
    assert [name for name, *_ in walk(net, x, ["once", "twice"], graph_of(net, x))] == ["once"]


def test_reconstruction_in_little_memory_is_about_as_good(images, monkeypatch):
    net = shrinking_net()
    made = plan(net, 0.4, layers={"0": {"rank": 4}})
    settings = Calibration(refine_steps=0)
    monkeypatch.setattr(lockstep, "ACTIVATIONS", 20 * 2 * 19 * 256 * 4)

    def error(small: nn.Module) -> float:
        with torch.no_grad():
            return float((small(images) - net(images)).square().mean())

    little = error(convert(net, made, calibration=images, settings=settings))
    monkeypatch.setattr(lockstep, "ACTIVATIONS", 2**30)
    plenty = error(convert(net, made, calibration=images, settings=settings))
    plain = error(convert(net, made))
    assert plenty < plain
    assert little < plain
    assert little < 1.3 * plenty
