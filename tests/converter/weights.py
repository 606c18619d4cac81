"""Weights to be written, read, and told from others."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from converter.errors import StiefelError
from converter.state_dicts import read_state


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(3, 4, bias=False)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


def network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 4, 3),
            norm=nn.BatchNorm2d(4),
            flat=nn.Flatten(),
            head=nn.Linear(4, 3),
        )
    )


def weights() -> dict[str, torch.Tensor]:
    return network().state_dict()


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def refusal(path, **options) -> str:
    with pytest.raises(StiefelError) as caught:
        read_state(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
