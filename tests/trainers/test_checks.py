"""What doesn't fit together is one clear line, before anything is trained."""

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from converter.convert import convert, plan
from converter.errors import StiefelError
from converter.models import load
from tests.trainers.networks import digits_network as network
from tests.trainers.short import Images, own, settings
from trainers.data import Data
from trainers.rank_schedule import RankSchedule
from trainers.rules import BP, DFA, SSA
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


def test_images_of_another_dtype_are_to_be_changed_and_not_the_weights():
    images = [(torch.randn(1, 8, 8, dtype=torch.float64), label) for label in range(10)]
    says = r"weights are float32, the images float64: .* \(image.float\(\) in the data set\)"
    with pytest.raises(StiefelError, match=says):
        train_local(network(), own(images), settings=settings(batch_size=2))


class Secretive(Dataset):
    """Doesn't tell its labels but with the images."""

    def __init__(self, labels):
        self.held = Images(labels)

    def __len__(self):
        return len(self.held)

    def __getitem__(self, index):
        return self.held[index]


class Ragged(Secretive):
    """Its images are of two sizes."""

    def __getitem__(self, index):
        image, label = self.held[index]
        return image[:, : 7 + label % 2], label


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (own(Images([])), "own has no training images"),
        (own(Images(range(10)), Images([])), "own has no test images"),
        (own(Images([3] * 20)), "one class only"),
        (own(Images([0, 1, 2, 10])), "label 10 is outside the 10 classes 0 … 9"),
        (own(Images([0, 1, -1, 4])), "label -1 is outside"),
        (own(Images([0, 1]), Images([0, 12])), "own, test images: label 12 is outside"),
        (own(Images([0.5, 1.0])), "labels must be whole numbers"),
        (own(Secretive([0, 1, 2, 17] * 4)), "label 17 is outside the 10 classes"),
        (own(Secretive([3] * 20)), "one class only"),
        (own(Ragged(range(10))), "the data set failed: RuntimeError: stack expects"),
        (own(Images(range(10), (3, 8, 8))), "can't take images 3x8x8"),
        (own(Images(range(10), (1, 16, 16))), "can't take images 1x16x16"),
        (own(Images(range(12)), classes=12), "12 classes, the network tells 10 apart"),
    ],
)
def test_bad_data_is_one_clear_error(given, says, tmp_path):
    with pytest.raises(StiefelError, match=says) as caught:
        train_local(network(), given, settings=settings(batch_size=2), out=tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_images_that_do_not_fit_the_model_s_own_specification_are_named():
    model = convert(dense := load("zoo:digits"), plan(dense, "0.4"))
    with pytest.raises(StiefelError, match="own has images 3x8x8, zoo:digits 1x8x8"):
        train_local(model, own(Images(range(10), (3, 8, 8))), settings=settings(batch_size=2))


@pytest.mark.parametrize("rule", [BP(), DFA(), SSA()], ids=lambda rule: rule.name)
def test_a_model_that_is_frozen_throughout_is_refused(rule, data):
    model = network().requires_grad_(False)
    with pytest.raises(StiefelError, match="every parameter of the model is frozen"):
        train_local(model, data, rule=rule, settings=TrainSettings(epochs=1, device="cpu"))


def test_a_model_that_is_not_built_yet_is_refused(data):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10))
    with pytest.raises(StiefelError, match=r"^1.weight holds no values yet: run or load the model"):
        train_local(model, data, rule=BP(), settings=settings())


def test_a_model_without_factored_layers_is_no_matter_for_ssa(data):
    with pytest.raises(StiefelError, match="no factored layer to train with rule ssa"):
        train_local(network(factored=False), data, rule=SSA(), settings=settings())


def test_a_batch_of_one_is_too_small_for_batch_norm_unless_frozen(data):
    for batch_norm in ("train", "sync"):
        alone = settings(batch_size=4, accumulate=4, batch_norm=batch_norm)
        with pytest.raises(StiefelError, match=r"too small for batch norm \(1\)"):
            train_local(network(), data, settings=alone)
    frozen = settings(batch_size=4, accumulate=4, batch_norm="frozen", epochs=1)
    train_local(network(), data, rule=BP(), settings=frozen)


def test_a_batch_that_cannot_be_split_evenly_is_refused(data):
    with pytest.raises(StiefelError, match="can't be split into 3 equal parts"):
        train_local(network(), data, settings=settings(accumulate=3))


def test_a_rank_schedule_that_would_raise_a_rank_is_refused_before_training(data, tmp_path):
    with pytest.raises(StiefelError, match="a schedule only lowers ranks"):
        train_local(
            network(), data, settings=settings(ranks=RankSchedule(final=30)), out=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_cuda_where_there_is_none_is_refused(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StiefelError, match="no CUDA device; use device cpu"):
        train_local(network(), data, settings=settings(device="cuda"))


def test_a_misspelt_setting_is_refused():
    with pytest.raises(ValidationError, match="learning_rate"):
        TrainSettings(learning_rate=0.1)
