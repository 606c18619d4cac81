"""The small networks that tests of training share."""

import torch
from torch import nn

from converter.convert import convert, plan


def digits_network(
    *, width: int = 24, dropout: float | None = None, factored: bool = True
) -> nn.Module:
    """Two convolutions and a linear layer for images 1x8x8 of ten classes, from a seed of its own.

    Args:
        width: channels of the first convolution.
        dropout: its rate, after the second activation; None: there is no such layer.
        factored: at 0.4 of full rank, or dense.
    """
    torch.manual_seed(1)
    dense = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        *([] if dropout is None else [nn.Dropout(dropout)]),
        nn.Flatten(),
        nn.Linear(384, 10),
    )
    return convert(dense, plan(dense, "0.4")) if factored else dense


def around(inner: nn.Module) -> nn.Sequential:
    """A network of which `inner` is a part."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), inner, nn.ReLU(), *head)
