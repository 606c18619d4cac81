"""What doesn't fit together is one clear line, before anything is trained."""

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import TensorDataset

from converter.errors import StiefelError
from trainers.data import Data
from trainers.rules import BP
from trainers.trainer import TrainSettings, train_local


def images(side: int, count: int = 16) -> TensorDataset:
    """Images (3, side, side) of four classes."""
    return TensorDataset(torch.randn(count, 3, side, side), torch.arange(count) % 4)


def train(network: nn.Module, side: int = 8, test_side: int = 8, out=None, **changes):
    data = Data(images(side), images(test_side), tuple("abcd"), "own")
    settings = TrainSettings(**{"epochs": 1, "batch_size": 8, "device": "cpu", **changes})
    return train_local(network, data, rule=BP(), settings=settings, out=out)


def refused(says: str, *given, **changes) -> None:
    with pytest.raises(StiefelError, match=says) as caught:
        train(*given, **changes)
    assert "\n" not in str(caught.value)


def test_an_assertion_about_the_images_is_one_clear_line():
    vit = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=4).eval()
    refused("the network can't take images 3x8x8 of torch.float32: Wrong image height!", vit)
    assert not any(module.training for module in vit.modules())


def test_test_images_that_do_not_fit_are_refused_before_training(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    before = network[1].weight.clone()
    says = "own has training images 3x8x8 and other .* network can't take images 3x10x10 of .*: mat"
    refused(says, network, test_side=10, out=tmp_path / "run")
    assert torch.equal(network[1].weight, before)
    assert not (tmp_path / "run").exists()


def test_test_images_of_another_size_will_do_for_a_network_of_any_size():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert len(train(network, test_side=10).records) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_a_dtype_that_is_not_trained_are_refused_by_it(dtype):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).to(dtype)
    refused(f"weights are {str(dtype)[6:]}, the images float32: training takes both in", network)
