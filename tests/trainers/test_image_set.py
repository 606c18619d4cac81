"""The same images in the same order, however they are read."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from converter.specs import InputSpec
from trainers.image_set import (
    Augmentation,
    ImageSet,
    balanced_subset,
    batches,
    begin_epoch,
    epoch_order,
    plain,
)


def image_set(side: int = 8, count: int = 20, augment: bool = True, reads=None) -> ImageSet:
    def read(index: int) -> torch.Tensor:
        if reads is not None:
            reads.append(index)
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator)

    change = Augmentation(shift=2, flip=True) if augment else None
    return ImageSet(
        read, torch.arange(count) % 4, InputSpec.natural((3, side, side)), augment=change
    )


@pytest.mark.parametrize("side", [8, 80])
def test_an_image_is_the_same_alone_in_a_batch_and_from_a_loader(side):
    data = image_set(side)
    data.set_epoch(3)
    x, y = data.batch(range(20))
    assert torch.equal(x[7], data[7][0])
    assert data[-1][1] == y[-1]
    loaded = next(iter(DataLoader(data, batch_size=20)))
    assert torch.equal(loaded[0], x)
    assert torch.equal(loaded[1], y)
    with pytest.raises(IndexError):
        data[20]


@pytest.mark.parametrize("side", [8, 80])
def test_epochs_differ_and_repeat(side):
    data = image_set(side)
    data.set_epoch(1)
    first = data.batch(range(20))[0]
    data.set_epoch(2)
    assert not torch.equal(first, data.batch(range(20))[0])
    data.set_epoch(1)
    assert torch.equal(first, data.batch(range(20))[0])


@pytest.mark.parametrize(("side", "workers"), [(8, 0), (80, 0), (80, 2)])
def test_batches_follow_the_order_whoever_reads(side, workers):
    data = image_set(side)
    data.set_epoch(4)
    order = epoch_order(20, 0, 4)[3:]
    found = list(batches(data, 6, order=order, workers=workers))
    assert [len(y) for _, y in found] == [6, 6, 5]
    x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    expected = data.batch(order)
    assert torch.equal(x, expected[0])
    assert torch.equal(y, expected[1])
    kept = list(batches(data, 6, order=order, workers=workers, drop_last=True))
    assert [len(y) for _, y in kept] == [6, 6]


def test_worker_processes_see_a_new_epoch_and_leave_random_numbers_alone():
    data = image_set(80)
    before = torch.get_rng_state()
    for epoch in (1, 2):
        data.set_epoch(epoch)
        x = torch.cat([x for x, _ in batches(data, 10, workers=1)])
        assert torch.equal(x, data.batch(range(20))[0])
    assert torch.equal(torch.get_rng_state(), before)


class Drawing(Dataset):
    """Each item is what is drawn for it, by torch, by Python and by numpy."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([torch.rand(()), random.random(), np.random.rand()]), index


def test_what_workers_draw_for_an_item_depends_on_nothing_else():
    def drawn(order, **rest):
        read = list(batches(Drawing(), 3, order=order, **{"workers": 2, "seed": 1, **rest}))
        x, y = (torch.cat(parts) for parts in zip(*read, strict=True))
        return dict(zip(y.tolist(), x, strict=True))

    whole = drawn(torch.arange(12))
    later = drawn(torch.arange(12)[3:], workers=1)
    assert all(torch.equal(later[index], whole[index]) for index in later)
    assert len({tuple(x.tolist()) for x in whole.values()}) == 12
    assert not torch.equal(drawn(torch.arange(3), seed=2)[0], whole[0])


def test_small_images_are_read_once_and_large_ones_each_time():
    for side, times in ((8, 1), (80, 3)):
        reads: list[int] = []
        data = image_set(side, reads=reads)
        for _ in range(3):
            data.batch(range(20))
        assert sorted(reads) == sorted([*range(20)] * times)


def test_a_part_and_a_plain_view_share_what_was_read():
    reads: list[int] = []
    data = image_set(reads=reads)
    part = data.limited(8, seed=0)
    assert part.labels.tolist().count(0) == 2
    assert len(part) == 8
    part.plain().batch(range(8))
    part.batch(range(8))
    assert len(reads) == 8
    assert data.limited(99, seed=0) is data
    # Their epochs are their own.
    part.set_epoch(9)
    assert int(data._epoch) == 0


def test_images_at_positions_come_in_that_order_and_keep_their_augmentation():
    data = image_set()
    part = data.at(torch.tensor([7, 3, 11])).at(torch.tensor([2, 0]))
    for one in (data, part):
        one.set_epoch(2)
    whole, labels = data.batch([11, 7])
    assert torch.equal(part.batch(range(2))[0], whole)
    assert torch.equal(part.labels, labels)


def test_an_epoch_begins_for_what_a_subset_is_of_too():
    data = image_set()
    part = Subset(Subset(data, range(4, 20)), [5])
    seen = []
    for epoch in (1, 2, 1):
        begin_epoch(part, epoch)
        seen.append(part[0][0])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    begin_epoch(Subset(TensorDataset(torch.zeros(3)), [0]), 1)  # has no epochs


class Doubled(Subset):
    """A subset of somebody's own, which changes its items."""

    def __getitems__(self, positions):
        return [(x * 2, y) for x, y in super().__getitems__(positions)]

    def __getitem__(self, position):
        return self.__getitems__([position])[0]


def test_a_subset_is_plain_where_what_it_is_of_can_be_and_itself_is_left_alone():
    data = image_set()
    bare = data.plain()
    part = Subset(Subset(data, range(4, 20)), [5, 0])
    data.set_epoch(1)
    assert torch.equal(plain(part)[0][0], bare[9][0])
    assert torch.equal(plain(Doubled(part, [1]))[0][0], bare[4][0] * 2)
    assert torch.equal(part[0][0], data[9][0])
    assert not torch.equal(part[0][0], bare[9][0])
    own = Subset(TensorDataset(torch.arange(3)), [2])
    assert plain(own)[0] == own[0]


def test_what_several_sets_make_up_is_plain_and_has_epochs_as_each_of_them():
    one, other = image_set(), image_set(count=8)
    both = ConcatDataset([one, Subset(other, [3, 1]), TensorDataset(torch.arange(3))])
    bare = plain(both)
    seen = []
    for epoch in (1, 2):
        begin_epoch(both, epoch)
        seen.append([both[position][0] for position in (9, 20)])
        for found, whole, index in ((9, one, 9), (20, other, 3)):
            assert torch.equal(both[found][0], whole[index][0])
            assert torch.equal(bare[found][0], whole.plain()[index][0])
    assert not any(map(torch.equal, *seen))
    assert bare[24] == both[24]


def test_a_limited_set_augments_each_image_as_the_whole_set_does():
    data = image_set()
    part = data.limited(8, seed=0)
    for one in (data, part):
        one.set_epoch(2)
    whole = data.batch(range(20))[0]
    for image in part.batch(range(8))[0]:
        assert any(torch.equal(image, other) for other in whole)


@given(st.integers(1, 300), st.integers(0, 99), st.integers(0, 99))
def test_an_epoch_s_order_is_a_permutation_of_its_own(count, seed, epoch):
    order = epoch_order(count, seed, epoch)
    assert order.sort().values.tolist() == list(range(count))
    assert torch.equal(order, epoch_order(count, seed, epoch))
    if count > 30:
        assert not torch.equal(order, epoch_order(count, seed, epoch + 1))
        assert not torch.equal(order, epoch_order(count, seed + 1, epoch))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 70))
def test_a_balanced_subset_is_as_even_as_the_classes_allow(labels, count):
    labels = torch.tensor(labels)
    chosen = balanced_subset(labels, count, seed=0)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, len(labels))
    assert torch.equal(chosen, chosen.sort().values)
    taken, there = labels[chosen].bincount(minlength=5), labels.bincount(minlength=5)
    # A class has fewer than another, by more than one, only where it has no more to give.
    for label in range(5):
        assert taken[label] >= min(int(there[label]), int(taken.max()) - 1)
