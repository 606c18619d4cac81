"""Networks that calibration must cope with, and what comes of them."""

import torch
from torch import nn

from converter.calibration import Calibration
from converter.convert import convert, plan

OFF = Calibration(
    whitened=False, sequential=False, match_batch_norm=False, sensitivity=0, refine_steps=0
)
QUICK = Calibration(refine_steps=3, refine_batch=8)
CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block of two convolutions, with or without batch norm."""

    def __init__(self, width: int = 6, norm: bool = True):
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.b = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.m = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.n = nn.BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x):
        h = self.n(self.b(self.m(self.a(x)).relu()))
        return (x + h).relu()


class Moody(nn.Module):
    """Can't be traced: what it does depends on its input's values."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x):
        h = self.a(x.flatten(1))
        return self.b(h.relu() if h.sum() > -1e9 else h)


class Constant(nn.Module):
    """Tracing makes an attribute of the tensor that it makes anew each time."""

    def forward(self, x):
        return x * torch.tensor(2.0)


def residual_net(norm: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        Block(6, norm),
        Block(6, norm),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def attention_net() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), Turned(), layer, nn.Flatten(), nn.Linear(72, 5)
    )


class Turned(nn.Module):
    def forward(self, x):
        return x.mT


NETS = {
    "residual": residual_net,
    "no batch norm": lambda: residual_net(norm=False),
    "linear only": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 5)
    ),
    "grouped": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 5)
    ),
    "attention": attention_net,
    "constant": lambda: nn.Sequential(Constant(), *residual_net()),
    "untraceable": lambda: nn.Sequential(nn.AvgPool2d(3), Moody()),
}


def settled(net: nn.Module) -> nn.Module:
    """With batch norms that have seen data and have scales of their own."""
    net.train()
    for _ in range(3):
        net(torch.randn(32, 3, 6, 6))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net.eval()


def shrunk(net: nn.Module, images: torch.Tensor, settings: Calibration, **k) -> nn.Module:
    made = plan(net, 0.3, calibration=images, settings=settings, **k)
    return convert(net, made, calibration=images, settings=settings)
