"""Where a traced network may be cut, and what counts as a layer there."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.trainers.networks import around
from trainers.cuts import CutSettings, cut
from trainers.rules import DFA, SSA, make_rule

LAYERS = CutSettings(boundaries="layers")


class Standardised(nn.Conv2d):
    """Weight standardisation: the kernel that is convolved with is made from the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


class _Inlined(nn.Module):
    """Runs a network whose layers are not torch's own, so that a trace goes into them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


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
