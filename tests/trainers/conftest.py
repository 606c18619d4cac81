"""Small networks of every kind that the local rules must cut."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from converter.convert import convert, plan
from converter.zoo import ZOO, MobileNetV1, small_conv
from tests.trainers.interrupting import InterruptAt, network, settings
from trainers.data import Data, load_data
from trainers.trainer import train_local


def _resnet() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5, width_per_group=16)


def _densenet() -> nn.Module:
    return torchvision.models.DenseNet(
        growth_rate=8, block_config=(6, 2), num_init_features=16, bn_size=2, num_classes=5
    )


def _vit() -> nn.Module:
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, dropout=0.1, num_classes=5)
    # torchvision's head starts at zero, where no error would reach what is before it.
    nn.init.normal_(vit.heads.head.weight, std=0.1)
    return vit


def _swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=5)


class _Shared(nn.Module):
    """One convolution used twice, and a constant that two blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.twice = nn.Conv2d(12, 12, 3, padding=1)
        self.offset = nn.Parameter(torch.randn(12, 1, 1))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        shift = self.offset * 0.5
        h = torch.relu(self.stem(x) + shift)
        h = torch.relu(self.twice(h) + shift)
        h = torch.relu(self.twice(h) + shift)
        return self.head(h.mean(dim=(2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: ZOO["mlp"](num_classes=5, width=24),
    "smallconv": lambda: small_conv(num_classes=5),
    "resnet20": lambda: ZOO["resnet20"](num_classes=5),
    "resnet": _resnet,
    "densenet": _densenet,
    "mobilenetv1": lambda: MobileNetV1(num_classes=5, width=0.125),
    "mobilenetv2": lambda: torchvision.models.MobileNetV2(num_classes=5, width_mult=0.25),
    "vit": _vit,
    "swin": _swin,
    "shared": _Shared,
}


@pytest.fixture
def dense() -> Callable[[str], nn.Module]:
    """Build a small dense network by name, in training mode, for images 3x32x32 of 5 classes."""

    def build(name: str) -> nn.Module:
        torch.manual_seed(0)
        return NETWORKS[name]().train()

    return build


@pytest.fixture
def factored(dense) -> Callable[[str], nn.Module]:
    """Build a small factored network by name; every layer that can be is factored."""

    def build(name: str) -> nn.Module:
        model = dense(name)
        return convert(model, plan(model, 4)).train()

    return build


@pytest.fixture
def images() -> Tensor:
    """Six images (6, 3, 32, 32)."""
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    """Their labels (6,), of five classes."""
    return torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.fixture
def parameters_behind() -> Callable[..., set[Tensor]]:
    """The leaves that a backward from these tensors would reach."""

    def find(*tensors: Tensor | None) -> set[Tensor]:
        seen, found = set(), set()
        stack = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                found.add(node.variable)
            stack += [upstream for upstream, _ in node.next_functions if upstream is not None]
        return found

    return find


@pytest.fixture(scope="module")
def data() -> Data:
    """A few digits to train and to test on."""
    return load_data("digits", limit_train=96, limit_test=40)


@pytest.fixture
def interrupted(data, tmp_path):
    """The folder of a run that was stopped in its first epoch."""
    train_local(network(), data, settings=settings(), out=tmp_path, progress=InterruptAt(1, 2))
    return tmp_path
