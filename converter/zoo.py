"""The paper's networks and a few neighbours, as plain modules that `torch.fx` can trace.

Every factory takes `num_classes` and `in_channels`. `ZOO` maps names to factories; `default_input`
says what each expects. The residual networks load the public `akamaster/pytorch_resnet_cifar10`
checkpoints as they are.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from converter.specs import InputSpec


def _conv_block(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """3x3 convolution, batch norm, ReLU."""
    return [
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def _linear_block(inputs: int, outputs: int) -> list[nn.Module]:
    """Linear, batch norm, ReLU."""
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]


class Convolutional(nn.Module):
    """Convolutions with max-pooling between them, then linear layers on the flattened rest.

    Args:
        plan: output channels of each 3x3 convolution, and "M" for 2x2 max-pooling.
        hidden: widths of the linear layers before the last.
        size: side of the square input; the linear layers' shape depends on it.
    """

    def __init__(
        self,
        plan: tuple[int | str, ...],
        hidden: tuple[int, ...],
        num_classes: int = 10,
        in_channels: int = 3,
        size: int = 32,
    ) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels = in_channels
        for step in plan:
            if step == "M":
                features.append(nn.MaxPool2d(2))
                size //= 2
            else:
                features += _conv_block(channels, int(step))
                channels = int(step)
        self.features = nn.Sequential(*features)
        widths = (channels * size * size, *hidden)
        layers = [
            module
            for inputs, outputs in pairwise(widths)
            for module in _linear_block(inputs, outputs)
        ]
        self.classifier = nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, size, size) to logits (N, num_classes)."""
        return self.classifier(self.features(x))


def small_conv(num_classes: int = 10, in_channels: int = 3, size: int = 32) -> Convolutional:
    """The paper's small net: three convolutions, 32-64-128 channels, then a layer of 128."""
    plan = (32, "M", 64, "M", 128, "M")
    return Convolutional(plan, (128,), num_classes, in_channels, size)


def digits(num_classes: int = 10, in_channels: int = 1, size: int = 8) -> Convolutional:
    """A net for the embedded 8x8 digits, wide enough that halving it means something (72k)."""
    return Convolutional((32, 64, "M", 64, "M"), (64,), num_classes, in_channels, size)


def vgg8(
    num_classes: int = 10, in_channels: int = 3, size: int = 32, width: float = 1.0
) -> Convolutional:
    """Six convolutions and two linear layers, with batch norm; `width` multiplies all of theirs."""
    plan = _widened((64, "M", 128, "M", 256, 256, "M", 512, 512, "M"), width)
    return Convolutional(plan, _widened((512,), width), num_classes, in_channels, size)


def vgg13(
    num_classes: int = 10, in_channels: int = 3, size: int = 32, width: float = 1.0
) -> Convolutional:
    """VGG-13 with batch norm, its linear layers 512 wide as is usual for 32x32 images.

    `width` multiplies every layer's channels.
    """
    plan = (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
    hidden = _widened((512, 512), width)
    return Convolutional(_widened(plan, width), hidden, num_classes, in_channels, size)


def _widened(plan: tuple[int | str, ...], width: float) -> tuple[int | str, ...]:
    return tuple(step if step == "M" else max(8, int(step * width)) for step in plan)


class MLP(nn.Module):
    """Linear layers with batch norm and ReLU on the flattened image."""

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        size: int = 32,
        width: int = 512,
        depth: int = 3,
    ) -> None:
        super().__init__()
        widths = (in_channels * size * size, *([width] * depth))
        blocks = [
            nn.Sequential(*_linear_block(inputs, outputs)) for inputs, outputs in pairwise(widths)
        ]
        self.flatten = nn.Flatten()
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, size, size) to logits (N, num_classes)."""
        return self.head(self.blocks(self.flatten(x)))


class _OptionA(nn.Module):
    """He et al.'s parameter-free shortcut: every second pixel, new channels zero on both sides."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        before = (outputs - inputs) // 2
        self.padding = (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], self.padding)


class _Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _OptionA(inputs, outputs) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR residual network of He et al. (2016, section 4.2): depth 6n + 2, 16-32-64 channels.

    Parameters are named as in akamaster's checkpoints (`layer1.0.conv1.weight`, `linear.weight`).
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        units = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, units, stride=1)
        self.layer2 = self._stage(16, 32, units, stride=2)
        self.layer3 = self._stage(32, 64, units, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int, units: int, stride: int) -> nn.Sequential:
        first = _Residual(inputs, outputs, stride)
        return nn.Sequential(first, *(_Residual(outputs, outputs, 1) for _ in range(units - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), usually 32x32, to logits (N, num_classes)."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.layer3(self.layer2(self.layer1(h)))
        return self.linear(h.mean(dim=(2, 3)))


def _resnet(depth: int) -> Callable[..., CifarResNet]:
    def factory(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
        return CifarResNet(depth, num_classes, in_channels)

    factory.__name__ = f"resnet{depth}"
    factory.__doc__ = f"The CIFAR ResNet-{depth}."
    return factory


class MobileNetV1(nn.Module):
    """MobileNet V1 (arXiv 1704.04861) with the strides that suit 32x32 images.

    Args:
        width: multiplies every layer's channels.
    """

    PLAN = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5)
    LAST = ((1024, 2), (1024, 1))

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        channels = max(8, int(32 * width))
        blocks: list[nn.Module] = [nn.Sequential(*_conv_block(in_channels, channels))]
        for outputs, stride in self.PLAN + self.LAST:
            outputs = max(8, int(outputs * width))
            blocks.append(
                nn.Sequential(
                    *_conv_block(channels, channels, stride, groups=channels),
                    nn.Conv2d(channels, outputs, 1, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(),
                )
            )
            channels = outputs
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, num_classes)."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def densenet(
    num_classes: int = 10, in_channels: int = 3, growth: int = 12, layers: int = 6
) -> nn.Module:
    """DenseNet-BC for small images (arXiv 1608.06993, section 4.2): depth 6 `layers` + 4.

    Args:
        growth: channels that each layer adds.
        layers: bottleneck layers in each of the three dense blocks.
    """
    from torchvision.models import DenseNet  # here, because it takes a second

    channels = 2 * growth
    model = DenseNet(growth, (layers,) * 3, channels, num_classes=num_classes)
    # Theirs is for ImageNet, and leaves an eighth of 32 pixels to the first dense block.
    model.features.conv0 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    model.features.pool0 = nn.Identity()
    return model


def vit(
    num_classes: int = 10,
    in_channels: int = 3,
    size: int = 32,
    patch: int = 4,
    width: int = 128,
    depth: int = 6,
    heads: int = 4,
) -> nn.Module:
    """A vision transformer (arXiv 2010.11929) for small images, its MLPs twice as wide.

    Args:
        size: side of the square input, a multiple of `patch`.
        patch: side of the squares that become tokens.
        width: of a token, a multiple of `heads`.
        depth: encoder layers.
        heads: of each attention.
    """
    from torchvision.models import VisionTransformer  # here, because it takes a second

    model = VisionTransformer(size, patch, depth, heads, width, 2 * width, num_classes=num_classes)
    if in_channels != model.conv_proj.in_channels:
        model.conv_proj = nn.Conv2d(in_channels, width, patch, patch)
    return model


ZOO: dict[str, Callable[..., nn.Module]] = {
    "smallconv": small_conv,
    "digits": digits,
    "mlp": MLP,
    "vgg8": vgg8,
    "vgg13": vgg13,
    **{f"resnet{depth}": _resnet(depth) for depth in (20, 32, 44, 56, 110)},
    "mobilenetv1": MobileNetV1,
    "densenet": densenet,
    "vit": vit,
}


def default_input(name: str, args: Mapping[str, Any]) -> InputSpec:
    """What `ZOO[name](**args)` expects: digits plain in 0..1, the others as CIFAR with ImageNet's.

    ImageNet's mean and standard deviation are what the public CIFAR residual networks were
    trained with.
    """
    size = int(args.get("size", 8 if name == "digits" else 32))
    channels = int(args.get("in_channels", 1 if name == "digits" else 3))
    make = InputSpec.plain if name == "digits" else InputSpec.natural
    return make((channels, size, size))
