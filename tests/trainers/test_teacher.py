"""The dense original as a teacher: lessons at each cut, and the lookahead through its blocks."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from converter.errors import StiefelError
from converter.zoo import CifarResNet
from trainers.losses import distillation
from trainers.memory import activation_memory_mib
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


@pytest.mark.parametrize("storage", ["stored", "recomputed"])
@pytest.mark.parametrize("lookahead", [0, 1, 2, 9])
def test_the_loss_is_what_its_definition_says(lookahead, storage):
    """Against the same loss written out, and autograd of it, block by block."""
    network, teacher = chain(1), chain(2)
    x, y = torch.randn(8, 1, 2, 3, dtype=torch.float64), torch.arange(8) % 5
    rule, state = start(SSA(memory=0, lookahead=lookahead, storage=storage), network, x, teacher)
    result = rule.step(network, state, x, y)

    # Linear and Tanh belong together, and the head to the last block.
    spans = [(0, 3), (3, 5), (5, 7)]
    wanted = [teacher[:end](x).detach() for _, end in spans]
    weight = 0.3 if lookahead else 1.0
    for index, (begin, end) in enumerate(spans):
        h = network[begin:end](network[:begin](x).detach())
        loss = weight * distillation(h, wanted[index])
        if index == 2:
            loss = loss + F.cross_entropy(network[7](h), y)
        for later in range(index + 1, min(index + lookahead, 2) + 1):
            h = teacher[slice(*spans[later])](h)
            loss = loss + weight * distillation(h, wanted[later])
            if later == 2:
                loss = loss + F.cross_entropy(teacher[7](h), y)
        own = [*network[begin : end + (index == 2)].parameters()]
        for parameter, gradient in zip(own, torch.autograd.grad(loss, own), strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        torch.testing.assert_close([*result.per_block.values()][index], loss.detach())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "densenet", "swin"])
@pytest.mark.parametrize("boundaries", ["units", "layers"])
def test_looking_ahead_leaves_the_teachers_own_features_alone(
    name, boundaries, dense, images, labels
):
    """Later blocks may write into a block's outputs: what is compared must not be spoilt by it."""
    teacher, network = dense(name), dense(name)
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


def test_a_recomputed_lookahead_holds_a_block_of_the_teacher_at_a_time():
    network, teacher = (CifarResNet(20, num_classes=5) for _ in range(2))
    held = {}
    for storage in ("stored", "recomputed"):
        rule = SSA(memory=0, lookahead=9, storage=storage)
        batch = torch.randn(4, 3, 32, 32)
        held[storage] = activation_memory_mib(
            network, rule, batch, num_classes=5, teacher=copy.deepcopy(teacher)
        )
    assert held["recomputed"] < held["stored"] / 2


def test_a_lookahead_without_a_teacher_is_refused(factored, images):
    with pytest.raises(StiefelError, match="name the dense original"):
        start(SSA(lookahead=1), factored("mlp"), images, None)


def test_a_lookahead_through_named_blocks_is_refused(dense, factored, images):
    settings = SSA(lookahead=1, blocks=("layer*",))
    with pytest.raises(StiefelError, match="cut by its graph"):
        start(settings, factored("resnet"), images, dense("resnet"))


class _Noisy(nn.Module):
    """Runs otherwise in training, so that places of the graph bear other names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        h = x.flatten(1)[:, :12]
        h = h + torch.randn_like(h) if self.training else h
        for layer in self.layers:
            h = h + torch.relu(layer(h))
        return self.head(self.norm(h))


def _sharing() -> tuple[nn.Module, nn.Module]:
    network, teacher = _Noisy(), _Noisy()
    teacher.layers[1] = network.layers[1]
    return network, teacher


def _mlp(depth: int, classes: int = 5) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(depth)]
    head = nn.Linear(12, classes)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(pooled, nn.Linear(12, 12), nn.Sequential(*layers), head)


def _small_vit() -> tuple[nn.Module, nn.Module]:
    """A teacher that asserts that images are 16x16."""
    return _mlp(3), torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=5)


AHEAD, NAMED = SSA(lookahead=1), SSA(blocks=("2.*",))


@pytest.mark.parametrize(
    ("settings", "pair", "message"),
    [
        (SSA(), _sharing, "shares parameters with the network"),
        (SSA(), lambda: (_Noisy(), _Noisy()), "block 'layers.0' has layers.0, the teacher"),
        (SSA(), lambda: (_mlp(3), _mlp(3).double()), "can't take images .* of torch.float32: .*"),
        (SSA(), _small_vit, "the teacher can't take images 3x32x32 of .*: Wrong image height!"),
        (SSA(), lambda: (_mlp(2), _mlp(3)), "has 2.1.0, 3, the teacher 2.1.0, 2.2.0, 3 there"),
        (NAMED, lambda: (_mlp(2), _mlp(3)), "blocks are 2.0, 2.1, 2.2, the network's 2.0, 2.1:"),
        (AHEAD, lambda: (_mlp(3), _mlp(3, 3)), "tells 3 classes apart, the network 5"),
        (AHEAD, lambda: (_mlp(3), _mlp(3, 9)), "tells 9 classes apart, the network 5"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_one_line(settings, pair, message, images):
    network, teacher = pair()
    with pytest.raises(StiefelError, match=message) as refused:
        start(settings, network, images, teacher)
    assert "\n" not in str(refused.value)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_teacher_of_other_classes_will_do_where_they_are_not_asked_for(images):
    network, teacher = _mlp(3), _mlp(3, 9)
    rule, state = start(SSA(), network, images, teacher)
    rule.step(network, state, images, torch.arange(len(images)) % 5)
    assert all(parameter.grad is not None for parameter in network.parameters())
