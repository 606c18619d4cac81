"""Accuracy and loss are those of the definition, and the model stays as it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

from converter.errors import StiefelError
from trainers.data import load_data
from trainers.evaluate import evaluate


class Items(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, int(y)


@pytest.fixture
def model() -> nn.Module:
    layers = nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 10)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("batch_size", [1, 7, 50, 999])
def test_it_is_the_mean_over_all_images_whatever_the_batch(model, batch_size):
    x, y = torch.randn(50, 1, 8, 8), torch.arange(50) % 10
    found = evaluate(model, Items(x, y), batch_size=batch_size)
    with torch.no_grad():
        logits = model.double().eval()(x.double())
    assert found.images == 50
    assert found.accuracy == (logits.argmax(1) == y).double().mean().item()
    assert found.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)


def test_training_images_are_evaluated_without_augmentation(model):
    train = load_data("digits", limit_train=80).train
    plain = load_data("digits", limit_train=80, augment=False).train
    train.set_epoch(3)
    found = evaluate(model, plain)
    assert evaluate(model, train) == found
    assert evaluate(model, Subset(Subset(train, range(80)), range(80))) == found


def test_modes_statistics_and_gradients_stay_as_they_were(model):
    model.train()
    model[2].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, load_data("digits", limit_test=30).test)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_progress_counts_the_images(model):
    seen = []
    data = load_data("digits", limit_test=30).test
    evaluate(model, data, batch_size=12, progress=lambda *now: seen.append(now))
    assert seen == [("evaluate", 12, 30), ("evaluate", 24, 30), ("evaluate", 30, 30)]


def test_a_model_and_its_images_may_be_in_double_precision(model):
    test = load_data("digits", limit_test=30).test
    single = evaluate(model, test)
    double = evaluate(model.double(), test)
    assert double.loss == pytest.approx(single.loss, rel=1e-5)


def test_low_precision_comes_near(model):
    test = load_data("digits", limit_test=100).test
    exact, near = evaluate(model, test), evaluate(model, test, precision="bf16")
    assert near.loss == pytest.approx(exact.loss, rel=0.02)
    assert near.loss != exact.loss


@pytest.mark.parametrize(
    ("model", "labels", "says"),
    [
        (nn.Flatten(), [64], r"has a label 64, the model tells 64 classes apart \(0 to 63\)"),
        (nn.Flatten(), [-1], "has a label -1"),
        (nn.Identity(), [0], r"no classifier: it returns \(1, 1, 8, 8\)"),
        (nn.LSTM(8, 3), [0], "no classifier"),
        (nn.Flatten(), [], "nothing to evaluate on"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_line(model, labels, says):
    count = len(labels)
    images = torch.randn(count, 8, 8) if isinstance(model, nn.LSTM) else torch.randn(count, 1, 8, 8)
    data = Items(images, torch.tensor(labels, dtype=torch.int64))
    model.train()
    with pytest.raises(StiefelError, match=says) as caught:
        evaluate(model, data)
    assert "\n" not in str(caught.value)
    assert model.training
