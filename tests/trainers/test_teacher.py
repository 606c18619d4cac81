"""The dense original as a teacher: lessons at each cut, and the lookahead through its blocks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from converter.errors import StiefelError
from trainers.losses import distillation
from trainers.rules import SSA, make_rule


def chain(seed: int) -> nn.Sequential:
    """Three linear layers in float64: three blocks, the last with the output head."""
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(6, 5)).double()


def start(settings, network, images, teacher):
    rule = make_rule(settings)
    generator = torch.Generator().manual_seed(0)
    return rule, rule.init(network, images, 5, generator, teacher)


@pytest.mark.parametrize("lookahead", [0, 1, 2, 9])
def test_the_loss_is_what_its_definition_says(lookahead):
    """Against the same loss written out, and autograd of it, block by block."""
    network, teacher = chain(1), chain(2)
    x, y = torch.randn(8, 1, 2, 3, dtype=torch.float64), torch.arange(8) % 5
    rule, state = start(SSA(lookahead=lookahead), network, x, teacher)
    result = rule.step(network, state, x, y)

    # Linear and Tanh belong together, and the head to the last block.
    spans = [(0, 3), (3, 5), (5, 7)]
    wanted = [teacher[:end](x).detach() for _, end in spans]
    for index, (begin, end) in enumerate(spans):
        h = network[begin:end](network[:begin](x).detach())
        loss = distillation(h, wanted[index])
        if index == 2:
            loss = loss + F.cross_entropy(network[7](h), y)
        for later in range(index + 1, min(index + lookahead, 2) + 1):
            h = teacher[slice(*spans[later])](h)
            loss = loss + distillation(h, wanted[later])
            if later == 2:
                loss = loss + F.cross_entropy(teacher[7](h), y)
        own = [*network[begin : end + (index == 2)].parameters()]
        for parameter, gradient in zip(own, torch.autograd.grad(loss, own), strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        torch.testing.assert_close([*result.per_block.values()][index], loss.detach())
    assert all(p.grad is None for p in teacher.parameters())


class InPlace(nn.Module):
    """Its second layer's output is added to the first's in place, across a cut at layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        h = self.first(x)
        h.add_(self.second(x))
        return self.head(F.relu(h).mean((2, 3)))


@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "densenet", "swin", "in place"])
@pytest.mark.parametrize("boundaries", ["units", "layers"])
def test_looking_ahead_leaves_the_teachers_own_features_alone(
    name, boundaries, dense, images, labels
):
    """Later blocks may write into a block's outputs: what is compared must not be spoilt by it."""
    teacher, network = (InPlace() if name == "in place" else dense(name) for _ in range(2))
    settings = SSA(lookahead=2, boundaries=boundaries)
    rule, state = start(settings, network, images, teacher)
    with torch.no_grad():
        wanted = [[root.clone() for root in roots] for roots, _ in state.teacher.cuts.walk(images)]
    for lesson, roots in zip(state.teacher.lessons(images), wanted, strict=True):
        # From its own features the teacher comes to its own features.
        for given, later, _ in lesson.onward(lesson.roots):
            torch.testing.assert_close(given, later)
        torch.testing.assert_close([*lesson.roots], roots, rtol=0, atol=0)
    rule.step(network, state, images, labels)
    assert all(p.grad is not None for p in network.parameters())


def test_a_lookahead_without_a_teacher_is_refused(factored, images):
    with pytest.raises(StiefelError, match="name the dense original"):
        start(SSA(lookahead=1), factored("mlp"), images, None)


def test_a_lookahead_through_named_blocks_is_refused(dense, factored, images):
    settings = SSA(lookahead=1, blocks=("layer*",))
    with pytest.raises(StiefelError, match="cut by its graph"):
        start(settings, factored("resnet"), images, dense("resnet"))
