"""Labelled images as a map-style data set, fast where images are small and frugal where large.

How to train on it so that a resumed run equals an uninterrupted one:

    for epoch in range(start, epochs):
        data.train.set_epoch(epoch)                # augmentation is drawn from (seed, epoch, index)
        order = epoch_order(len(data.train), seed, epoch)
        for x, y in batches(data.train, batch_size, order=order[already_seen:]):
            ...

`batches` reads small images from memory, a batch at a time; for large ones it starts worker
processes. A plain DataLoader over the set gives the same items.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, get_worker_info

from converter.errors import StiefelError
from converter.specs import InputSpec
from trainers.augment import (
    crop_for_testing,
    crop_for_training,
    normalise,
    seeded,
    shift_and_flip,
    uniform,
)
from trainers.labels import as_indices
from trainers.randomness import seed_host

SMALL_SIDE = 64  # up to here images are shifted rather than cropped, and kept in memory
CACHE_BYTES = 2 * 2**30

Item = tuple[Tensor, int]


@dataclass(frozen=True)
class Augmentation:
    """How images are changed at random.

    Small images are shifted by up to `shift` pixels; large ones are cropped as for ImageNet.
    """

    shift: int
    flip: bool


class ImageSet(Dataset[Item]):
    """Images (C, H, W) float32, normalised as the model expects, and int labels.

    Args:
        read: gives image i as uint8 (C, h, w), of any size.
        labels: (N,) int64, of all images that `read` knows.
        spec: what the model expects.
        augment: how images are changed at random; None: not at all.
        seed: of the augmentation.
    """

    def __init__(
        self,
        read: Callable[[int], Tensor],
        labels: Tensor,
        spec: InputSpec,
        *,
        augment: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self._read = read
        self._labels = labels
        self._indices = torch.arange(len(labels))
        # Shared memory, so that worker processes that live on see a new epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._decoded = _Decoded(len(labels), spec.shape)
        self.spec = spec
        self.augment = augment
        self.seed = seed

    @property
    def labels(self) -> Tensor:
        """(len(self),) int64."""
        return self._labels[self._indices]

    @property
    def small(self) -> bool:
        """Whether images are small enough to be shifted rather than cropped."""
        return max(self.spec.shape[1:]) <= SMALL_SIDE

    @property
    def in_memory(self) -> bool:
        """Whether decoded images are kept."""
        return self.small and self._decoded.size_bytes <= CACHE_BYTES

    def set_epoch(self, epoch: int) -> None:
        """From now on draw this epoch's augmentation."""
        self._epoch[0] = epoch

    def plain(self) -> "ImageSet":
        """The same images without augmentation."""
        return self._like(self._indices, None)

    def limited(self, count: int | None, seed: int) -> "ImageSet":
        """At most `count` of the images, as evenly from the classes as can be."""
        if count is None or count >= len(self):
            return self
        return self.at(balanced_subset(self.labels, count, seed))

    def at(self, positions: Tensor) -> "ImageSet":
        """The images at these positions (n,) int64, in that order; the epoch is its own."""
        return self._like(self._indices[positions], self.augment)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Item:
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """Several items at once, which is what a DataLoader asks for."""
        x, y = self.batch(positions)
        return list(zip(x, y.tolist(), strict=True))

    def batch(self, positions: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) float32 and labels (N,) int64 at these positions."""
        indices = self._indices[torch.as_tensor(positions, dtype=torch.int64)]
        if self.augment is None:
            images = self._fitted(indices)
        elif self.small:
            draws = uniform(self.seed, int(self._epoch), indices, 3)
            shift, flip = self.augment.shift, self.augment.flip
            images = shift_and_flip(self._fitted(indices), draws, shift=shift, flip=flip)
        else:
            images = self._cropped(indices, self.augment)
        return normalise(images, self.spec), self._labels[indices]

    def _fitted(self, indices: Tensor) -> Tensor:
        """uint8 (N, C, H, W), resized and cropped the same way every time."""
        fit = crop_for_testing(self.spec)

        def decode(index: int) -> Tensor:
            return fit(self._read(index))

        if self.in_memory:
            return self._decoded.get(indices, decode)
        return torch.stack(_threaded(decode, indices.tolist()))

    def _cropped(self, indices: Tensor, augment: Augmentation) -> Tensor:
        """uint8 (N, C, H, W), cropped at random."""
        change = crop_for_training(self.spec, flip=augment.flip)
        epoch = int(self._epoch)
        crops = [seeded(change, self._read(i), self.seed, epoch, i) for i in indices.tolist()]
        return torch.stack(crops)

    def _like(self, indices: Tensor, augment: Augmentation | None) -> "ImageSet":
        new = ImageSet.__new__(ImageSet)
        new.__dict__.update(self.__dict__)
        new._indices, new.augment = indices, augment
        new._epoch = self._epoch.clone().share_memory_()
        return new


class _Decoded:
    """Decoded images in one block of memory, filled as they are asked for."""

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        self.shape = (count, *shape)
        self.size_bytes = count * shape[0] * shape[1] * shape[2]
        self._images: Tensor | None = None
        self._present = torch.zeros(count, dtype=torch.bool)

    def get(self, indices: Tensor, decode: Callable[[int], Tensor]) -> Tensor:
        """uint8 (N, C, H, W)."""
        if self._images is None:
            self._images = torch.empty(self.shape, dtype=torch.uint8)
        missing = indices[~self._present[indices]].unique()
        if len(missing):
            self._images[missing] = torch.stack(_threaded(decode, missing.tolist()))
            self._present[missing] = True
        return self._images[indices]


class _Reseeded(Dataset[Item]):
    """What a worker draws depends on seed and item (or batch), not on what it drew before.

    So that a resumed run goes on as it would have, whichever worker reads what.
    """

    def __init__(self, dataset: Dataset[Item], seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, position: int) -> Item:
        self._seed_for(position)
        return self._dataset[position]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        if not hasattr(self._dataset, "__getitems__"):
            return [self[position] for position in positions]
        self._seed_for(positions[0])
        return self._dataset.__getitems__(positions)

    def _seed_for(self, position: int) -> None:
        seed_host(int(uniform(self._seed, 0, torch.tensor([position]), 1)[0, 0] * 2**31))


def plain(dataset: Dataset[Item]) -> Dataset[Item]:
    """The same images without augmentation: an `ImageSet`'s, a `Subset`'s or a `ConcatDataset`'s.

    A data set of somebody's own is as it is.
    """
    if isinstance(dataset, ImageSet):
        return dataset.plain()
    if isinstance(dataset, Subset):
        # A copy, for a subclass may do more than choose.
        dataset = copy(dataset)
        dataset.dataset = plain(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        dataset = copy(dataset)
        dataset.datasets = [plain(part) for part in dataset.datasets]
    return dataset


def begin_epoch(dataset: Dataset[Item], epoch: int) -> None:
    """Tell a data set which epoch it is, if it asks; else those that it is a part or made of."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            begin_epoch(part, epoch)
    elif hasattr(dataset, "dataset"):
        begin_epoch(dataset.dataset, epoch)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A random permutation (count,) int64 that depends on seed and epoch only."""
    return uniform(seed + 1, epoch, torch.arange(count), 1).flatten().argsort()


def batches(
    dataset: Dataset[Item],
    batch_size: int,
    *,
    order: Tensor | None = None,
    drop_last: bool = False,
    workers: int | None = None,
    pin_memory: bool = False,
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (N, C, H, W) and labels (N,) int64 of the data set, batch by batch.

    Args:
        order: (n,) int64, positions in the order to read them; all, in their own order, if None.
        drop_last: leave out a last batch that is not full.
        workers: processes that read ahead; None: none where images are in memory, else up to 8.
        pin_memory: ready the batches for copying to a GPU.
        seed: of what a data set of your own draws in worker processes; the caller's random state
            is not touched.

    Raises:
        StiefelError: an image can't be read or isn't finite, or labels are fractions.
    """
    order = torch.arange(len(dataset)) if order is None else order  # type: ignore[arg-type]
    chunks = [chunk for chunk in order.split(batch_size) if len(chunk) == batch_size]
    if not drop_last and len(order) % batch_size:
        chunks.append(order[len(order) - len(order) % batch_size :])
    own = not isinstance(dataset, ImageSet)  # somebody's
    if not own and (dataset.in_memory or workers == 0):
        for chunk in chunks:
            x, y = dataset.batch(chunk)
            yield (x.pin_memory(), y.pin_memory()) if pin_memory else (x, y)
        return
    if workers is None:
        workers = 0 if own else min(8, os.cpu_count() or 1)
    with reading():
        loader = DataLoader(
            _Reseeded(dataset, seed) if workers and own else dataset,
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=min(workers, len(chunks)),
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed),
            worker_init_fn=_outlive_one_signal,
        )
        for x, y in loader:
            if own and not x.isfinite().all():  # ours are made of whole numbers
                raise StiefelError("the data set has images with values that are not finite")
            yield x, as_indices(torch.as_tensor(y))


def _outlive_one_signal(worker: int) -> None:
    """A SIGTERM for all processes of a group is the training's to heed, at the end of its step.

    The next one ends the worker, so that it can be stopped at all.
    """
    default = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, default))


@contextmanager
def reading() -> Iterator[None]:
    """Turn whatever a data set of somebody's own raises into one line."""
    try:
        yield
    except Exception as error:
        kind, text = type(error).__name__, str(error).strip()
        line = " ".join(text.split())
        if text.startswith("Caught "):  # by a worker, which ends its traceback with the message
            line = text.splitlines()[-1]
            line = line.partition(f"{kind}: ")[2] or line
        ours = isinstance(error, StiefelError)
        raise StiefelError(line if ours else f"the data set failed: {kind}: {line}") from error


def balanced_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Sorted positions of `count` of the labels (N,), drawn in turn from each class.

    Class sizes differ by at most one, save where a class has no more to give.
    """
    order = epoch_order(len(labels), seed, 0)
    by_class = order[labels[order].argsort(stable=True)]
    sizes = labels.unique(return_counts=True)[1]
    turn = torch.cat([torch.arange(int(size)) for size in sizes])
    return by_class[turn.argsort(stable=True)[:count]].sort().values


def _threaded(decode: Callable[[int], Tensor], indices: list[int]) -> list[Tensor]:
    # Decoding JPEG leaves the interpreter free; worker processes are parallel as it is.
    threads = min(8, os.cpu_count() or 1)
    if len(indices) < 32 or threads == 1 or get_worker_info() is not None:
        return [decode(index) for index in indices]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(decode, indices))
