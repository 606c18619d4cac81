"""Tracing: what a graph cannot say is taken whole or refused, and what it says is what runs."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from converter.errors import StiefelError
from tests.trainers.networks import around
from trainers.cuts import CutSettings, cut
from trainers.rules import DFA, make_rule

LAYERS = CutSettings(boundaries="layers")


class Branching(nn.Module):
    """Its own forward depends on the data, so it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.first(h) if h.sum() > 1e9 else self.second(h)


class LayerDrop(nn.Module):
    """Leaves layers out at random in training."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(4))
        self.draw = draw

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or self.draw() < 0.5:
                h = h + layer(h)
        return h


class Centred(nn.Module):
    """Keeps a running mean, and counts its batches in a buffer that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 1)
        self.register_buffer("mean", torch.zeros(8, 1, 1))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        h = self.layer(h)
        self.batches = self.batches + 1
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(dim=(0, 2, 3))[:, None, None])
        return h - self.mean


class Scaled(nn.Module):
    """Divides by a running scale, as it was before this batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 1)
        self.register_buffer("scale", torch.ones(8, 1, 1))

    def forward(self, h: Tensor) -> Tensor:
        h, before = self.layer(h), self.scale * 1.0
        self.scale.lerp_(h.detach().abs().mean(dim=(0, 2, 3))[:, None, None], 0.1)
        return h / before


class Gated(nn.Module):
    """A branch without gradients, or in a precision of its own."""

    def __init__(self, context) -> None:
        super().__init__()
        self.layer, self.gate = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.context = context

    def forward(self, h: Tensor) -> Tensor:
        with self.context():
            gate = torch.sigmoid(self.gate(h.float()))
        return self.layer(h) * gate


class Counting(nn.Module):
    """Counts its batches, and goes by their number or does not."""

    def __init__(self, goes_by_it: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 1)
        self.batches, self.goes_by_it = 0, goes_by_it

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            self.batches += 1
        return self.layer(h) * (self.batches if self.goes_by_it else 1)


class RunningMean(nn.Module):
    """Goes by a running mean that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 1)
        self.mean = torch.zeros(())

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * h.detach().mean()
        return self.layer(h) - self.mean


class Stashing(nn.Module):
    """Leaves its last output for whoever looks, and does not look itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 1)
        self.last = torch.zeros(())

    def forward(self, h: Tensor) -> Tensor:
        h = self.layer(h)
        self.last = h.detach()
        return h


def own_precision() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize(
    "inner",
    [
        Branching(),
        LayerDrop(lambda: torch.rand(1).item()),
        LayerDrop(random.random),
        LayerDrop(np.random.random),
        Centred(),
        Scaled(),
        Gated(torch.no_grad),
        Gated(own_precision),
        Counting(goes_by_it=True),
        RunningMean(),
    ],
    ids=[
        "branching",
        "torch's numbers",
        "Python's numbers",
        "numpy's numbers",
        "buffers",
        "a buffer read before it is written",
        "without gradients",
        "precision",
        "a count",
        "a tensor that is no buffer",
    ],
)
def test_a_submodule_that_a_graph_cannot_tell_is_taken_whole(inner, images):
    cuts = cut(around(inner).train(), images, LAYERS)
    assert cuts.traced.opaque == {"2"}
    assert [block.layers for block in cuts.blocks] == [("0",), ("2", "6")]


@pytest.mark.parametrize("settings", [CutSettings(), LAYERS])
def test_a_network_that_is_looked_at_stays_as_it_was(settings, images):
    network = around(Centred()).train()
    before = copy.deepcopy(network.state_dict())
    numbers = torch.get_rng_state(), random.getstate()
    cut(network, images, settings)
    assert all(torch.equal(v, before[name]) for name, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]


@pytest.mark.parametrize("inner", [Centred(), Scaled(), Counting(goes_by_it=True), RunningMean()])
def test_what_a_forward_changes_goes_on_in_blocks_as_in_the_network(inner, images):
    network = around(inner).train()
    whole = copy.deepcopy(network)
    cuts = cut(network, images, LAYERS)
    for _ in range(5):
        logits = cuts.run(images, lambda *_: None)
        torch.testing.assert_close(logits, whole(images).detach())
    for (name, ours), theirs in zip(network.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    if hasattr(inner, "batches"):
        assert network[2].batches == whole[2].batches == 5


def test_a_part_without_gradients_has_none_in_blocks_either(images):
    network = around(Gated(torch.no_grad)).train()
    cuts = cut(network, images, LAYERS)
    cuts.run(images, lambda i, roots, logits: sum(r.square().mean() for r in roots).backward())
    assert network[2].gate.weight.grad is None
    assert network[2].layer.weight.grad is not None


def test_a_part_in_a_precision_of_its_own_keeps_it_in_blocks(images):
    network = around(Gated(own_precision)).train()
    kept = []
    network[2].gate.register_forward_hook(lambda m, i, output: kept.append(output.dtype))
    cuts = cut(network, images, LAYERS)
    kept.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cuts.run(images, lambda *_: None)
        network(images)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("inner", [Counting(goes_by_it=False), Stashing()])
def test_what_nothing_goes_by_is_no_matter(inner, images):
    network = around(inner).train()
    cuts = cut(network, images, LAYERS)
    assert cuts.traced.opaque == frozenset()
    assert all(vars(network[2])[name] == 0 for name in ("batches", "last") if hasattr(inner, name))


class Remembering(nn.Sequential):
    """Keeps what it saw last, to be looked at."""

    def forward(self, h: Tensor) -> Tensor:
        self.seen = super().forward(h)
        return self.seen


def test_what_a_forward_keeps_of_tracing_is_not_left_behind(images):
    network = Remembering(*around(nn.Identity())).train()
    cut(network, images, LAYERS)
    assert not hasattr(network, "seen")
    copy.deepcopy(network)


def test_layers_that_are_left_out_at_random_all_train(images):
    network = around(LayerDrop(lambda: torch.rand(1).item())).train()
    cuts = cut(network, images, LAYERS)
    for _ in range(20):
        cuts.run(images, lambda i, roots, logits: roots[0].square().mean().backward())
    assert all(layer.weight.grad is not None for layer in network[2].layers)


@pytest.mark.parametrize(
    "network",
    [
        Branching(),
        LayerDrop(random.random),
        Centred(),
        Scaled(),
        Gated(torch.no_grad),
        Gated(own_precision),
        Counting(goes_by_it=True),
    ],
    ids=lambda network: type(network).__name__,
)
def test_a_network_that_a_graph_cannot_tell_is_refused_with_the_way_out(network):
    name = type(network).__name__
    with pytest.raises(StiefelError, match=rf"{name} cannot be traced \(.*blocks"):
        cut(network.train(), torch.randn(2, 8, 4, 4), LAYERS)


class Optional(nn.Module):
    """Takes more than the images, if it is given more."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x, mask=None, scale=2.0, *more, features=False, **rest):
        if mask is not None or more or rest.get("flip"):
            x = -x
        h = self.body(x).mean(dim=(2, 3)) * scale
        return h if features else self.head(h)


class Needing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x, mask):
        return self.layer((x * mask).flatten(1)[:, :12])


def test_arguments_beside_the_images_keep_their_defaults(images):
    network = Optional().train()
    cuts = cut(network, images, LAYERS)
    assert [block.layers[0] for block in cuts.blocks] == ["body.0", "body.2"]
    torch.testing.assert_close(cuts.run(images, lambda *_: None), network(images).detach())


def test_an_argument_without_a_default_is_named(images):
    with pytest.raises(StiefelError, match="its forward needs 'mask' beside the images"):
        cut(Needing(), images, LAYERS)


@pytest.mark.parametrize(
    "inner",
    [LayerDrop(random.random), Centred(), nn.InstanceNorm2d(8, track_running_stats=True)],
    ids=["numbers", "buffers", "instance norm"],
)
def test_recomputed_blocks_draw_and_keep_what_stored_ones_do(inner, images, labels):
    network, found = around(inner), []
    for storage in ("stored", "recomputed"):
        ours, rule = copy.deepcopy(network).train(), make_rule(DFA(storage=storage))
        state = rule.init(ours, images, 5, torch.Generator().manual_seed(0), None)
        random.seed(1)
        rule.step(ours, state, images, labels)
        left = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
        found.append({**left, **dict(ours.named_buffers()), "next": torch.tensor(random.random())})
    torch.testing.assert_close(*found)
