"""Data sets by name or folder; the embedded digits.

`load_data` gives training and test images as `ImageSet`s: see `trainers.image_set` for how to
iterate over one so that a resumed run repeats exactly. Nothing is ever downloaded.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from converter.errors import StiefelError, did_you_mean
from converter.factories import call_factory, import_factory
from converter.specs import InputSpec
from trainers.image_set import (
    Augmentation,
    ImageSet,
    Item,
    balanced_subset,
    batches,
    begin_epoch,
    epoch_order,
    plain,
    reading,
)
from trainers.labels import known_labels
from trainers.sources import CHANNEL_MODES, KINDS, Source

__all__ = [
    "Data",
    "ImageSet",
    "batches",
    "begin_epoch",
    "epoch_order",
    "examples",
    "images",
    "load_data",
]


MOST_CLASSES = 10**6  # that labels alone may tell of


@dataclass(frozen=True)
class Data:
    """Training and test images of one kind.

    `train` is empty where a bare folder of classes was given, which is a test set.
    """

    train: Dataset[Item]
    test: Dataset[Item]
    classes: tuple[str, ...]
    name: str


def load_data(
    spec: str,
    *,
    input: InputSpec | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    seed: int = 0,
    augment: bool = True,
) -> Data:
    """The data that `spec` names, its images ready for a model.

    Args:
        spec: `digits`, `cifar10:DIR`, `cifar100:DIR`, `imagenet:DIR`, `imagefolder:DIR` (with
            train/ and test/ or val/, or a bare folder of classes to test on),
            `fake:CxHxW[:CLASSES]`, or `FILE.py:factory`, which returns (train, test) data sets of
            float32 images and int labels, or a `Data`.
        input: the size and normalisation that the model expects; what suits the data if None.
        limit_train, limit_test: at most so many images, drawn evenly from the classes.
        seed: of the limits and the augmentation.
        augment: shifts, crops and mirroring of the training images, as suit the data.

    Raises:
        StiefelError: unknown or absent data, or images that can't become the model's input.
    """
    for name, limit in (("limit_train", limit_train), ("limit_test", limit_test)):
        if limit is not None and limit < 1:
            raise StiefelError(f"{name} must be at least 1, not {limit}")
    spec = str(spec)
    kind, _, rest = spec.partition(":")
    if kind not in KINDS:
        if ":" in spec and (".py:" in spec or "." in kind):
            return _from_factory(spec, input, limit_train, limit_test, seed)
        near = did_you_mean(kind, KINDS) or f"; there are {', '.join(KINDS)}, FILE.py:factory"
        raise StiefelError(f"unknown data '{spec}'{near}")
    if not rest and kind != "digits":
        raise StiefelError(f"data '{spec}' needs more: write {kind}:{KINDS[kind][1]}")
    sources = KINDS[kind][0](rest, input)
    expected = input or sources.input
    if sources.fixed_shape and expected.shape != sources.input.shape:
        raise StiefelError(
            f"images of {spec} are {_x(sources.input.shape)}, the model expects "
            f"{_x(expected.shape)}; give the model matching arguments (in_channels, size), or its "
            "own input shape where that is another"
        )
    if expected.shape[0] not in CHANNEL_MODES:
        raise StiefelError(f"the model expects {expected.shape[0]} channels; images have 1, 3 or 4")

    def image_set(source: Source, change: Augmentation | None) -> ImageSet:
        return ImageSet(source.read, source.labels, expected, augment=change, seed=seed)

    train = image_set(sources.train, sources.augment if augment else None)
    test = image_set(sources.test, None)
    return Data(
        train.limited(limit_train, seed), test.limited(limit_test, seed), sources.classes, spec
    )


def images(dataset: Dataset[Item], count: int, seed: int = 0) -> Tensor:
    """`count` images without augmentation: (count, C, H, W) float32; all if there are fewer.

    They are drawn evenly from the classes where labels are known without reading the images.

    Raises:
        StiefelError: the data set is empty.
    """
    return examples(dataset, count, seed)[0]


def examples(dataset: Dataset[Item], count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`images`, and their labels (count,) int64."""
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise StiefelError("no images to draw from: the data set is empty")
    dataset = plain(dataset)
    if isinstance(dataset, ImageSet):
        return dataset.limited(count, seed).batch(range(min(count, len(dataset))))
    with reading():
        labels = known_labels(dataset)
        if labels is None:
            chosen = epoch_order(len(dataset), seed, 0)[:count]  # type: ignore[arg-type]
        else:
            chosen = balanced_subset(labels, count, seed)
        x, y = zip(*(dataset[index] for index in chosen.tolist()), strict=True)
        return torch.stack(x), torch.tensor([int(label) for label in y])


def _from_factory(
    name: str, input: InputSpec | None, limit_train: int | None, limit_test: int | None, seed: int
) -> Data:
    made = call_factory(name, import_factory(name), {})
    if not isinstance(made, Data):
        if not isinstance(made, tuple | list) or len(made) not in (2, 3):
            kind = type(made).__name__
            raise StiefelError(f"{name} returned a {kind}, not (train, test) data sets")
        train, test, *rest = made
        for part in (train, test):
            if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
                kind = type(part).__name__
                raise StiefelError(f"{name} returned a {kind}; data sets need a length and items")
        names = rest[0] if rest else getattr(train, "classes", None)
        with reading():
            empty = not len(train)
        if names is None and empty:
            raise StiefelError(f"{name} has no training images, and names no classes")
        if names is not None and (isinstance(names, str) or not isinstance(names, Iterable)):
            kind = type(names).__name__
            raise StiefelError(f"{name} returned a {kind} as third item, not the classes' names")
        if names is None:
            _check_items(name, train, input)
            names = _numbered(name, _labels(train))
        made = Data(train, test, tuple(map(str, names)), name)
    for part in (made.train, made.test):
        _check_items(name, part, input)
    limited = (
        _limited(part, limit, seed)
        for part, limit in ((made.train, limit_train), (made.test, limit_test))
    )
    return Data(*limited, made.classes, made.name)


def _check_items(name: str, dataset: Dataset[Item], input: InputSpec | None) -> None:
    """Refuse a data set by its first item, where it has one.

    Raises:
        StiefelError: it can't be read, is no image with its label, or of another shape.
    """
    with reading():
        first = dataset[0] if len(dataset) else None  # type: ignore[arg-type]
    if first is None:
        return
    if not _is_item(first):
        raise StiefelError(f"{name} must give items (float32 image (C, H, W), int label)")
    shape = tuple(first[0].shape)
    if input is not None and shape != input.shape:
        raise StiefelError(f"{name} gives images {_x(shape)}, the model expects {_x(input.shape)}")


def _numbered(name: str, labels: Tensor) -> list[str]:
    """As many classes as the highest label tells.

    Raises:
        StiefelError: it tells something else.
    """
    highest = int(labels.max())
    if highest >= MOST_CLASSES:
        raise StiefelError(
            f"{name}: label {highest} is no number of a class; count them from 0, or return the "
            "classes' names as a third item"
        )
    return [str(label) for label in range(highest + 1)]


def _is_item(item: Any) -> bool:
    return (
        isinstance(item, tuple | list)
        and len(item) == 2
        and isinstance(item[0], Tensor)
        and item[0].dim() == 3
        and item[0].is_floating_point()
        and _is_whole(item[1])
    )


def _is_whole(label: Any) -> bool:
    if isinstance(label, Tensor):
        return label.ndim == 0 and not label.is_floating_point()
    return isinstance(label, Integral)


def _limited(dataset: Dataset[Item], limit: int | None, seed: int) -> Dataset[Item]:
    if limit is None or limit >= len(dataset):  # type: ignore[arg-type]
        return dataset
    if isinstance(dataset, ImageSet):
        return dataset.limited(limit, seed)
    chosen = balanced_subset(_labels(dataset), limit, seed)
    return torch.utils.data.Subset(dataset, chosen.tolist())


def _labels(dataset: Any) -> Tensor:
    with reading():
        if (known := known_labels(dataset)) is not None:
            return known
        return torch.tensor([int(dataset[index][1]) for index in range(len(dataset))])


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
