"""Every image of an epoch goes to one process and one step, whoever takes part."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from trainers.data import Data, epoch_order
from trainers.distributed import World
from trainers.settings import TrainSettings
from trainers.shares import Shares


def numbered(count: int) -> TensorDataset:
    """Images that tell their place in the data set."""
    x = torch.arange(count, dtype=torch.float32).reshape(count, 1, 1, 1)
    return TensorDataset(x, torch.zeros(count, dtype=torch.long))


def places(images: list[torch.Tensor]) -> list[int]:
    return torch.cat(images).flatten().int().tolist()


class Deal:
    """One epoch as `size` processes see it, each batch in `accumulate` parts."""

    def __init__(self, size: int, accumulate: int, images: int, batch_size: int) -> None:
        self.images = images
        data = Data(numbered(images), numbered(images), ("a", "b"), "numbered")
        settings = TrainSettings(batch_size=batch_size, accumulate=accumulate, seed=3)
        device = torch.device("cpu")
        self.shares = [Shares(data, settings, World(rank, size), device) for rank in range(size)]

    def steps(self, epoch: int, done: int) -> list[list[int]]:
        """The images of each step, of all parts and processes."""
        each = [
            list(shares.training(epoch, done, torch.contiguous_format)) for shares in self.shares
        ]
        return [places([x for parts in step for x, _ in parts]) for step in zip(*each, strict=True)]


deals = st.builds(
    lambda size, accumulate, part, images: Deal(
        size, accumulate, images + size * accumulate, part * size * accumulate
    ),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 40),
)


@given(deals, st.integers(1, 3))
def test_a_step_is_the_same_images_whoever_takes_part(deal, epoch):
    shares = deal.shares[0]
    order = epoch_order(deal.images, 3, epoch)[: shares.steps * shares.batch]
    alone = order.view(shares.steps, shares.batch).sort(dim=1).values.tolist()
    assert [sorted(step) for step in deal.steps(epoch, 0)] == alone


@given(deals)
def test_a_resumed_epoch_goes_on_where_it_stopped(deal):
    steps = deal.steps(1, 0)
    for done in range(len(steps) + 1):
        assert deal.steps(1, done) == steps[done:]


@given(deals)
def test_parts_are_equal_and_so_many_to_a_step(deal):
    for shares in deal.shares:
        for parts in shares.training(1, 0, torch.contiguous_format):
            assert {len(x) for x, _ in parts} == {shares.part}
            assert len(parts) * shares.part * len(deal.shares) == shares.batch


@given(deals)
def test_each_test_image_is_seen_once(deal):
    seen = [int(x) for shares in deal.shares for x, _ in shares.test()]
    assert sorted(seen) == list(range(len(seen)))
