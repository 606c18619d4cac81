"""Networks that write into their tensors: cuts and teachers must see what plain forward would."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainers.cuts import CutSettings, cut
from trainers.rules import DFA, SSA, make_rule


class _Network(nn.Module):
    """Convolutions of equal width, and a head on averaged maps."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(layers)]
        self.layers = nn.ModuleList(convolutions)
        self.short, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.features(x)).mean((2, 3)))

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Statement(_Network):
    """The sum is not returned to a name: all that follows reads `h` itself."""

    def features(self, x):
        first, *rest = self.layers
        h = first(x)
        h.add_(self.short(x))
        for layer in rest:
            h = layer(torch.relu(h))
        return h


class Later(_Network):
    """What the first block made is written into two blocks later."""

    def features(self, x):
        first, second, third = self.layers
        h = self.short(x)
        h = h.add_(second(torch.relu(first(x))))
        return third(torch.relu(h))


class Part(_Network):
    """Half of the channels are written into, through a view."""

    def features(self, x):
        first, second, third = self.layers
        h = first(x)
        h[:, :2].add_(self.short(x)[:, :2])
        h = second(torch.relu(h))
        return third(torch.relu(h))


class View(_Network):
    """What a block made is written into through a view, and by the view alone read on."""

    def features(self, x):
        first, second, third = self.layers
        h = second(torch.relu(first(x) + self.short(x)))
        h = h.flatten(2).exp_().unflatten(2, (32, 32))
        return third(torch.relu(h))


class Image(_Network):
    """The image itself is normalised in place."""

    def features(self, x):
        h = x.sub_(0.5).div_(0.25)
        for layer in self.layers:
            h = torch.relu(layer(h))
        return h + self.short(x)


class Activation(_Network):
    """Activations overwrite what norms might want, and the sum of a unit what entered it."""

    def features(self, x):
        first, *rest = self.layers
        h = F.relu(first(x), inplace=True)
        for layer in rest:
            h += F.relu(layer(h), True)
        return h.add_(self.short(x)).relu_()


class Start(_Network):
    """Blocks begin by writing into what the block before them made, and may have saved."""

    def features(self, x):
        h = torch.sigmoid(self.short(x))
        for layer in self.layers[1:]:
            h = torch.sigmoid(layer(F.max_pool2d(h, 2).mul_(2)))
        return F.max_pool2d(h, 2).mul_(3) + self.layers[0](x).mean()


NETWORKS = [Statement, Later, Part, View, Image, Activation, Start]


@pytest.fixture(params=NETWORKS, ids=lambda made: made.__name__)
def network(request) -> nn.Module:
    torch.manual_seed(0)
    return request.param()


def _reached(network: nn.Module, roots: tuple[Tensor, ...]) -> set[str]:
    """Names of the parameters to which gradients of these tensors flow."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    total = sum(root.sum() for root in roots)
    found = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
    return {name for name, gradient in zip(names, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("boundaries", ["balanced", "units", "layers"])
def test_blocks_compute_what_the_network_computes_and_no_gradient_crosses(
    network, boundaries, images
):
    cuts = cut(network, images, CutSettings(boundaries=boundaries))
    seen: list[set[str]] = []

    def visit(index: int, roots: tuple[Tensor, ...], logits: Tensor | None) -> None:
        assert roots
        seen.append(_reached(network, roots if logits is None else (*roots, logits)))

    before = images.clone()
    logits = cuts.run(images, visit)
    torch.testing.assert_close(images, before, rtol=0, atol=0)
    torch.testing.assert_close(logits, network(images))
    assert len(cuts.blocks) > (boundaries == "layers")
    names = {parameter: name for name, parameter in network.named_parameters()}
    for reached, block in zip(seen, cuts.blocks, strict=True):
        assert reached <= {names[parameter] for parameter in block.parameters()}
    assert set().union(*seen) == set(names.values())


@pytest.mark.parametrize("boundaries", ["balanced", "units", "layers"])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("storage", ["stored", "recomputed"])
def test_a_teacher_that_is_a_copy_has_nothing_to_teach(
    network, boundaries, lookahead, storage, images
):
    teacher, labels = copy.deepcopy(network), torch.arange(len(images)) % 5
    rule = make_rule(SSA(boundaries=boundaries, lookahead=lookahead, storage=storage))
    state = rule.init(network, images, 5, torch.Generator(), teacher)
    losses = [*rule.step(network, state, images, labels).per_block.values()]
    output = F.cross_entropy(network(images.clone()), labels)
    # The labels are heard at the output alone, to which the last blocks look ahead.
    count = len(losses)
    wanted = [output * (index + lookahead + 1 >= count) for index in range(count)]
    torch.testing.assert_close(torch.stack(losses), torch.stack(wanted))


class Dropped(_Network):
    """In evaluation dropout returns what came in; in training `h` is not what is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def features(self, x):
        first, second, third = self.layers
        h = first(x)
        changed = self.drop(h).add_(self.short(x))
        return third(torch.relu(second(torch.relu(changed))) + h)


@pytest.mark.parametrize("boundaries", ["balanced", "units", "layers"])
def test_what_is_written_is_told_from_what_dropout_lets_through(boundaries, images):
    network = Dropped()
    cuts = cut(network, images, CutSettings(boundaries=boundaries))
    results = []
    for run in (network, lambda x: cuts.run(x, lambda *_: None)):
        torch.manual_seed(0)
        results.append(run(images))
    torch.testing.assert_close(*results)


class Named(nn.Sequential):
    """Cut by name; the image is normalised in place, and activations overwrite blocks' outputs."""

    blocks = ("layers.0", "layers.2", "layers.4")

    def __init__(self) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(n, 4, 3) for n in (3, 4, 4))
        between = (nn.ReLU(inplace=True) for _ in range(2))
        self.layers = nn.Sequential(first, next(between), second, next(between), third)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def forward(self, x):
        return super().forward(x.sub_(0.5).div_(0.25))


def test_named_blocks_hand_on_what_may_be_written_into(images):
    network, labels = Named(), torch.arange(len(images)) % 5
    rule, generator = make_rule(SSA(blocks=Named.blocks)), torch.Generator()
    state = rule.init(network, images, 5, generator, copy.deepcopy(network))
    before = images.clone()
    *losses, _ = rule.step(network, state, images, labels).per_block.values()
    assert torch.stack(losses).tolist() == [0, 0]
    assert torch.equal(images, before)


class DroppedInPlace(_Network):
    """Dropout writes, in training alone, into a view of what a block gave."""

    def __init__(self) -> None:
        super().__init__()
        self.activation, self.drop = nn.ReLU(), nn.Dropout(0.5, inplace=True)

    def features(self, x):
        first, second, third = self.layers
        h = self.activation(second(torch.relu(first(x) + self.short(x))))
        return third(self.drop(h.flatten(2)).unflatten(2, (32, 32)))


class NamedDroppedInPlace(DroppedInPlace):
    """The same, cut by name."""

    blocks = ("layers.0", "activation", "layers.2")


@pytest.mark.parametrize("rule", [DFA, partial(SSA, error="global", similarity=1)])
@pytest.mark.parametrize(
    "made", [*NETWORKS, DroppedInPlace, Named, NamedDroppedInPlace], ids=lambda made: made.__name__
)
def test_stored_blocks_give_what_recomputed_ones_do(made, rule, images):
    network, labels, gradients = made(), torch.arange(len(images)) % 5, []
    where = {"blocks": made.blocks} if hasattr(made, "blocks") else {"boundaries": "layers"}
    for storage in ("stored", "recomputed"):
        learner = make_rule(rule(storage=storage, **where))
        state = learner.init(network, images, 5, torch.Generator().manual_seed(0))
        network.zero_grad()
        torch.manual_seed(0)
        learner.step(network, state, images, labels)
        gradients.append([p.grad.clone() for p in network.parameters()])
    torch.testing.assert_close(*gradients)
