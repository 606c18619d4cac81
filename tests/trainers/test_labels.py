"""Labels in whatever form a data set has them."""

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from converter.errors import StiefelError
from trainers.data import Data, batches, load_data
from trainers.evaluate import evaluate
from trainers.labels import known_labels
from trainers.rules import BP, DFA
from trainers.trainer import TrainSettings, train_local


class Kept(TensorDataset):
    """Images 1x8x8 with these labels, and what else it is to keep."""

    def __init__(self, of, **kept):
        of = torch.as_tensor(of)
        super().__init__(torch.randn(len(of), 1, 8, 8), of)
        self.__dict__.update(kept)


def trained(train, test=None, rule=None) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    data = Data(train, train if test is None else test, tuple("abcd"), "own")
    settings = TrainSettings(epochs=1, batch_size=8, device="cpu")
    train_local(network, data, rule=rule or BP(), settings=settings)
    return network


def test_what_is_no_label_of_each_image_is_not_taken_for_one():
    labels = torch.arange(8, dtype=torch.uint8) % 4
    for kept, known in (
        ({"labels": labels}, True),
        ({"targets": labels.tolist()}, True),
        ({"labels": list("abcd"), "targets": labels.tolist()}, True),
        ({"labels": list("abcdabcd")}, False),
        ({"labels": range(4)}, False),
        ({"labels": labels / 2}, False),
        ({"labels": labels[:, None]}, False),
        ({"labels": None, "targets": print}, False),
        ({"targets": labels, "target_transform": int}, False),
        ({"targets": labels, "target_transform": None}, True),
        ({"targets": labels + 1}, False),
        ({"labels": labels + 1, "targets": labels}, True),
    ):
        found = known_labels(Kept(labels, **kept))
        assert (found is not None) == known, kept
        if known:
            assert found.dtype == torch.int64
            assert found.tolist() == labels.tolist()


def test_labels_are_known_though_the_first_item_cannot_be_read():
    class Broken(Kept):
        def __getitem__(self, index):
            raise OSError("truncated")

    assert known_labels(Subset(Broken([0, 1], targets=[0, 1]), [1])).tolist() == [1]


def test_a_part_of_a_set_and_what_several_make_up_know_their_labels():
    whole = load_data("digits").train
    part = Subset(Subset(whole, range(100)), [7, 3])
    assert torch.equal(known_labels(part), whole.labels[[7, 3]])
    assert known_labels(Subset(Kept([0, 1]), [1])) is None
    assert known_labels(Subset(whole, [])).shape == (0,)
    both = ConcatDataset([part, Kept([5, 6], targets=[5, 6])])
    assert known_labels(both).tolist() == [*whole.labels[[7, 3]].tolist(), 5, 6]
    assert known_labels(ConcatDataset([part, Kept([0, 1])])) is None


@pytest.mark.parametrize("rule", [BP(), DFA()])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_whole_numbers_of_any_dtype_train_the_same(dtype, rule):
    wide, narrow = (Kept(torch.arange(32).to(kind) % 4) for kind in (torch.int64, dtype))
    narrow.tensors = (wide.tensors[0], narrow.tensors[1])
    assert all(y.dtype == torch.int64 for _, y in batches(narrow, 8))
    one, other = trained(wide, rule=rule), trained(narrow, rule=rule)
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert evaluate(one, narrow) == evaluate(one, wide)


def test_narrow_labels_are_not_taken_for_others_among_many_classes():
    # 256 is 0 in uint8, and nothing is less than that.
    data = Kept(torch.tensor([0, 255] * 8, dtype=torch.uint8))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 300))
    own = Data(data, data, tuple(map(str, range(256))), "own")
    settings = TrainSettings(epochs=1, batch_size=8, device="cpu")
    train_local(network, own, rule=BP(), settings=settings)


def test_targets_that_items_are_made_of_are_not_held_against_them():
    labels = torch.arange(32) % 4
    trained(Kept(labels, targets=labels + 1, target_transform=lambda y: y - 1))
    trained(Kept(labels, targets=labels + 1))
    trained(Kept(labels, labels=list("abcd")))


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [
        (Kept([0.0, 1.0] * 8), None, "own, training images: labels must be whole numbers, not"),
        (Kept([0, 1] * 8), Kept([0.0, 1.0]), "own, test images: labels must be whole numbers, not"),
        (Kept([0, 1] * 8), Kept([7, 1]), "own, test images: label 7 is outside"),
        (Subset(Kept([0, 1], labels=[0, 1]), [0, 9]), None, "the data set failed: IndexError"),
    ],
)
def test_labels_that_cannot_be_are_one_clear_line_before_training(train, test, says):
    with pytest.raises(StiefelError, match=says) as caught:
        trained(train, test)
    assert "\n" not in str(caught.value)


def test_fractions_are_not_evaluated_as_labels():
    with pytest.raises(StiefelError, match="labels must be whole numbers, not torch.float32"):
        evaluate(nn.Flatten(), Kept([0.0, 1.5]))
