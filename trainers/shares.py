"""How an epoch's images are dealt out: to steps, to processes, and to the parts of a step."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from trainers import checks
from trainers.data import Data, batches, begin_epoch, epoch_order
from trainers.distributed import World
from trainers.image_set import Item
from trainers.settings import TrainSettings

Part = tuple[Tensor, Tensor]


class Shares:
    """This process's share of each batch, in equal parts, one forward pass each.

    Attributes:
        part: images to a forward pass of one process.
        batch: images to a step, of all processes.
        steps: to an epoch; what is left over sits it out.

    Raises:
        StiefelError: there are fewer training images than parts.
    """

    def __init__(
        self,
        data: Data,
        settings: TrainSettings,
        world: World,
        device: torch.device,
    ) -> None:
        self._data, self._settings, self._world = data, settings, world
        self._device = device
        parts = settings.accumulate * world.size
        self.part = checks.count_part(len(data.train), settings.batch_size, parts)
        self.batch = self.part * parts
        self.steps = len(data.train) // self.batch

    def training(self, epoch: int, done: int, layout: torch.memory_format) -> Iterator[list[Part]]:
        """The epoch's steps after the first `done`: for each its parts, x and y on the device.

        Raises:
            StiefelError: a label is outside the classes.
        """
        settings, train = self._settings, self._data.train
        begin_epoch(train, epoch)
        order = epoch_order(len(train), settings.seed, epoch)[: self.steps * self.batch]
        order = order.view(self.steps, settings.accumulate, self._world.size, self.part)
        mine = order[done:, :, self._world.rank].flatten()
        loading = {
            "workers": settings.workers,
            "pin_memory": self._device.type == "cuda",
            "seed": settings.seed + epoch,
        }
        parts = []
        for x, y in batches(train, self.part, order=mine, **loading):
            checks.check_labels(y, len(self._data.classes), self._data.name)
            x = x.to(self._device, memory_format=layout, non_blocking=True)
            parts.append((x, y.to(self._device, non_blocking=True)))
            if len(parts) == settings.accumulate:
                yield parts
                parts = []

    def test(self) -> Dataset[Item]:
        """This process's share of the test images: together they see each of them once."""
        test, world = self._data.test, self._world
        if world.size == 1:
            return test
        return Subset(test, range(world.rank, len(test), world.size))  # type: ignore[arg-type]
