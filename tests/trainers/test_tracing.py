"""Tracing: what a graph cannot say is taken whole or refused, and what it says is what runs."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from converter.errors import StiefelError
from trainers.cuts import CutSettings, cut
from trainers.rules import DFA, SSA, make_rule

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


def own_precision() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


class Standardised(nn.Conv2d):
    """Weight standardisation: the kernel that is convolved with is made from the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


def around(inner: nn.Module) -> nn.Sequential:
    """A network of which `inner` is a part."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), inner, nn.ReLU(), *head)


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


@pytest.mark.parametrize("inner", [Centred(), Scaled(), Counting(goes_by_it=True)])
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


def test_a_count_that_nothing_goes_by_is_no_matter(images):
    network = around(Counting(goes_by_it=False)).train()
    cuts = cut(network, images, LAYERS)
    assert cuts.traced.opaque == frozenset()
    assert network[2].batches == 0


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


@pytest.mark.parametrize("boundaries", ["balanced", "units", "layers"])
def test_a_layer_whose_weight_is_standardised_is_a_layer(boundaries, images, parameters_behind):
    layers = [(Standardised(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()) for _ in range(3)]
    inner = nn.Sequential(*(layer for group in layers for layer in group))
    network = around(inner).train()
    # Traced into, as where the convolution is a function of the network's own forward.
    cuts = cut(_Inlined(network), images, CutSettings(boundaries=boundaries))
    names = [layer for block in cuts.blocks for layer in block.layers]
    assert names == [f"net.{n}" for n in ("0", "2.0", "2.3", "2.6", "6")]
    reached: set[Tensor] = set()

    def visit(index, roots, logits):
        assert roots
        reached.update(parameters_behind(*roots, logits))

    cuts.run(images, visit)
    assert reached == set(network.parameters())


class Positions(nn.Module):
    """Two layers see a constant alone, and their result joins the map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.places = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)
        self.register_buffer("grid", torch.cartesian_prod(*[torch.linspace(-1, 1, 32)] * 2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        h = h + self.places(self.grid).T.reshape(1, 8, 32, 32)
        return self.head(torch.relu(self.last(h)).mean((2, 3)))


@pytest.mark.parametrize("boundaries", ["balanced", "units", "layers"])
@pytest.mark.parametrize("rule", [SSA, DFA])
def test_layers_of_a_constant_make_no_block_and_train_where_it_is_read(rule, boundaries, images):
    network, labels = Positions(), torch.arange(len(images)) % 5
    learner = make_rule(rule(boundaries=boundaries))
    state = learner.init(network, images, 5, torch.Generator().manual_seed(0))
    assert all(block.roots for block in state.cuts.blocks)
    layers = [layer for block in state.cuts.blocks for layer in block.layers]
    assert layers == ["first", "last", "head"]
    learner.step(network, state, images, labels)
    assert all(p.grad is not None for p in network.parameters())


class Weighed(nn.Module):
    """A number of the whole batch, or of what a layer makes of it, is live throughout."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3) for i in range(3))
        self.head, self.trained = nn.Linear(8, 5), trained

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.layers
        h = torch.relu(first(x))
        weight = (h if self.trained else x).abs().mean()
        for layer in rest:
            h = torch.relu(layer(h))
        return self.head(h.mean((2, 3))) * weight


def test_numbers_of_the_batch_pass_cuts_unless_layers_train_through_them(images):
    network = Weighed(trained=False)
    cuts = cut(network, images, LAYERS)
    assert [b.layers for b in cuts.blocks] == [("layers.0",), ("layers.1",), ("layers.2", "head")]
    assert all(len(block.roots) == 1 for block in cuts.blocks)
    torch.testing.assert_close(cuts.run(images, lambda *_: None), network(images))
    cuts = cut(Weighed(trained=True), images, LAYERS)
    assert [b.layers for b in cuts.blocks] == [("layers.0",), ("layers.1", "layers.2", "head")]


class FunctionalNorm(nn.LayerNorm):
    """torchvision's ConvNeXt has such norms."""

    def forward(self, h: Tensor) -> Tensor:
        h = F.layer_norm(h.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias)
        return h.permute(0, 3, 1, 2)


@pytest.mark.parametrize("boundaries", ["units", "layers"])
def test_a_norm_that_is_a_function_is_no_layer(boundaries, images):
    stages = [(nn.Conv2d(n, 8, 3), FunctionalNorm(8), nn.ReLU()) for n in (3, 8, 8)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    network = nn.Sequential(*(m for stage in stages for m in stage), *head)
    cuts = cut(network, images, CutSettings(boundaries=boundaries))
    assert [block.layers for block in cuts.blocks] == [("0",), ("3",), ("6", "11")]


class _Inlined(nn.Module):
    """Runs a network whose layers are not torch's own, so that a trace goes into them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class DeadEnd(nn.Module):
    """Runs a layer whose result nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 1) for i in range(3))
        self.aside, self.head = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
            self.aside(x.mean(dim=(2, 3)))
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("boundaries", ["balanced", "units", "layers"])
def test_a_layer_whose_result_is_not_read_makes_no_block(boundaries, images):
    cuts = cut(DeadEnd().train(), images, CutSettings(boundaries=boundaries))
    assert all(block.roots for block in cuts.blocks)
    assert "aside" not in [layer for block in cuts.blocks for layer in block.layers]


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
