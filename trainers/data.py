"""Data sets by name or folder; the embedded digits.

`load_data` gives training and test images as `ImageSet`s: see `trainers.image_set` for how to
iterate over one so that a resumed run repeats exactly. Nothing is ever downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2 import functional as VF

from converter.errors import StiefelError, did_you_mean
from converter.factories import call_factory, import_factory
from converter.specs import InputSpec, parse_shape
from trainers.image_set import (
    SMALL_SIDE,
    Augmentation,
    ImageSet,
    Item,
    balanced_subset,
    batches,
    epoch_order,
)

__all__ = ["Data", "ImageSet", "batches", "epoch_order", "images", "load_data"]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_TEST_FOLDERS = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class Data:
    """Training and test images of one kind.

    `train` is empty where a bare folder of classes was given, which is a test set.
    """

    train: Dataset[Item]
    test: Dataset[Item]
    classes: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class _Source:
    """Images before they are fitted to a model: how to read one, and their labels (N,)."""

    read: Callable[[int], Tensor]
    labels: Tensor


@dataclass(frozen=True)
class _Sources:
    train: _Source
    test: _Source
    classes: tuple[str, ...]
    input: InputSpec  # what suits the data where no model says
    augment: Augmentation
    fixed_shape: bool = False  # resizing would make no sense


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
    kind, _, rest = spec.partition(":")
    if kind not in _KINDS:
        if ":" in spec and (".py:" in spec or "." in kind):
            return _from_factory(spec, limit_train, limit_test, seed)
        near = did_you_mean(kind, _KINDS) or f"; there are {', '.join(_KINDS)}, FILE.py:factory"
        raise StiefelError(f"unknown data '{spec}'{near}")
    if not rest and kind != "digits":
        raise StiefelError(f"data '{spec}' needs more: write {kind}:{_KINDS[kind][1]}")
    sources = _KINDS[kind][0](rest, input)
    expected = input or sources.input
    if sources.fixed_shape and expected.shape != sources.input.shape:
        raise StiefelError(
            f"images of {spec} are {_x(sources.input.shape)}, the model expects "
            f"{_x(expected.shape)}; give the model matching arguments (in_channels, size)"
        )
    if expected.shape[0] not in _MODES:
        raise StiefelError(f"the model expects {expected.shape[0]} channels; images have 1, 3 or 4")

    def image_set(source: _Source, change: Augmentation | None) -> ImageSet:
        return ImageSet(source.read, source.labels, expected, augment=change, seed=seed)

    train = image_set(sources.train, sources.augment if augment else None)
    test = image_set(sources.test, None)
    return Data(
        train.limited(limit_train, seed), test.limited(limit_test, seed), sources.classes, spec
    )


def images(dataset: Dataset[Item], count: int, seed: int = 0) -> Tensor:
    """`count` images without augmentation, drawn evenly from the classes: (count, C, H, W) float32.

    All of them if there are fewer.

    Raises:
        StiefelError: the data set is empty.
    """
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise StiefelError("no images to draw from: the data set is empty")
    if isinstance(dataset, ImageSet):
        return dataset.plain().limited(count, seed).batch(range(min(count, len(dataset))))[0]
    order = epoch_order(len(dataset), seed, 0)[:count]  # type: ignore[arg-type]
    return torch.stack([dataset[index][0] for index in order.tolist()])


def _digits(rest: str, input: InputSpec | None) -> _Sources:
    from sklearn.datasets import load_digits  # here, because it takes a second

    bundle = load_digits()
    pixels = torch.from_numpy(np.rint(bundle.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bundle.target.astype(np.int64))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[balanced_subset(labels, 360, seed=0)] = True
    return _Sources(
        train=_in_memory(pixels[~held_out], labels[~held_out]),
        test=_in_memory(pixels[held_out], labels[held_out]),
        classes=tuple(map(str, bundle.target_names)),
        input=InputSpec.plain((1, 8, 8)),
        augment=Augmentation(shift=1, flip=False),  # a mirrored digit is another or none
        fixed_shape=True,
    )


def _cifar(kind: str, dataset: type[datasets.CIFAR10]) -> Callable[..., _Sources]:
    def load(rest: str, input: InputSpec | None) -> _Sources:
        root = Path(rest)
        if root.name == dataset.base_folder:
            root = root.parent
        if not (root / dataset.base_folder).is_dir():
            folder = (root / "train").is_dir() and f"; for a folder of images: imagefolder:{rest}"
            raise StiefelError(
                f"no {dataset.base_folder} in {root}; unpack {dataset.filename} there{folder or ''}"
            )
        try:
            train, test = (dataset(root, train=part) for part in (True, False))
        except Exception as error:  # torchvision checks the files' sums
            raise StiefelError(f"{kind} in {root} is incomplete or corrupt") from error
        return _Sources(
            train=_in_memory(_channels_first(train.data), torch.tensor(train.targets)),
            test=_in_memory(_channels_first(test.data), torch.tensor(test.targets)),
            classes=tuple(train.classes),
            input=InputSpec.natural((3, 32, 32)),
            augment=Augmentation(shift=4, flip=True),
        )

    return load


def _image_folder(rest: str, input: InputSpec | None) -> _Sources:
    root = Path(rest)
    if not root.is_dir():
        raise StiefelError(f"there is no folder {root}")
    test = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
    if (root / "train").is_dir():
        if test is None:
            raise StiefelError(f"{root} has train/ but no test/ or val/ beside it")
        train_files, classes = _scan(root / "train")
        test_files, test_classes = _scan(test)
        if strange := sorted(set(test_classes) - set(classes)):
            raise StiefelError(f"{test} has a class '{strange[0]}' that {root / 'train'} hasn't")
        known = {name: number for number, name in enumerate(classes)}
        test_files = [(file, known[test_classes[label]]) for file, label in test_files]
    else:
        train_files = []
        test_files, classes = _scan(test or root)
    expected = input or _input_like(test_files[0][0])
    channels, height, width = expected.shape
    return _Sources(
        train=_files(train_files, channels),
        test=_files(test_files, channels),
        classes=classes,
        input=expected,
        # Grey images are mostly writing, and a mirrored letter is another or none.
        augment=Augmentation(shift=max(1, min(height, width) // 8), flip=channels > 1),
    )


def _imagenet(rest: str, input: InputSpec | None) -> _Sources:
    sources = _image_folder(rest, input or InputSpec(resize=256))
    if len(sources.classes) != 1000:
        raise StiefelError(
            f"{rest} has {len(sources.classes)} classes, not ImageNet's 1000; for a part of it use "
            f"imagefolder:{rest}"
        )
    return sources


def _fake(rest: str, input: InputSpec | None) -> _Sources:
    """Noise around one random pattern a class: learnable, but no data."""
    text, _, number = rest.partition(":")
    shape = parse_shape(text)
    if number and not (number.isdigit() and int(number) > 1):
        raise StiefelError(f"'fake:{rest}': the number of classes must be 2 or more")
    classes = int(number or 10)

    def source(first: int, count: int) -> _Source:
        labels = torch.arange(first, first + count) % classes

        def read(index: int) -> Tensor:
            pattern = torch.Generator().manual_seed(int(labels[index]))
            noise = torch.Generator().manual_seed(2**32 + first + index)
            mean = torch.randint(64, 192, (shape[0], 4, 4), generator=pattern).float()
            mean = torch.nn.functional.interpolate(mean[None], shape[1:])[0]
            return (mean + 32 * torch.randn(shape, generator=noise)).clamp(0, 255).byte()

        return _Source(read, labels)

    return _Sources(
        train=source(0, max(500, 10 * classes)),
        test=source(10**6, max(200, 4 * classes)),
        classes=tuple(str(number) for number in range(classes)),
        input=InputSpec.natural(shape),
        augment=Augmentation(shift=max(1, min(shape[1:]) // 8), flip=False),
        fixed_shape=True,
    )


_KINDS: dict[str, tuple[Callable[[str, InputSpec | None], _Sources], str]] = {
    "digits": (_digits, ""),
    "cifar10": (_cifar("cifar10", datasets.CIFAR10), "DIR"),
    "cifar100": (_cifar("cifar100", datasets.CIFAR100), "DIR"),
    "imagenet": (_imagenet, "DIR"),
    "imagefolder": (_image_folder, "DIR"),
    "fake": (_fake, "CxHxW"),
}


def _from_factory(name: str, limit_train: int | None, limit_test: int | None, seed: int) -> Data:
    made = call_factory(name, import_factory(name), {})
    if not isinstance(made, Data):
        if not isinstance(made, tuple | list) or len(made) not in (2, 3):
            kind = type(made).__name__
            raise StiefelError(f"{name} returned a {kind}, not (train, test) data sets")
        train, test, *rest = made
        names = rest[0] if rest else getattr(train, "classes", None)
        if names is None:
            names = [str(label) for label in range(int(_labels(train).max()) + 1)]
        made = Data(train, test, tuple(map(str, names)), name)
    for part in (made.train, made.test):
        if len(part) and not _is_item(part[0]):  # type: ignore[arg-type]
            raise StiefelError(f"{name} must give items (float32 image (C, H, W), int label)")
    limited = (
        _limited(part, limit, seed)
        for part, limit in ((made.train, limit_train), (made.test, limit_test))
    )
    return Data(*limited, made.classes, made.name)


def _is_item(item: Any) -> bool:
    return (
        isinstance(item, tuple | list)
        and len(item) == 2
        and isinstance(item[0], Tensor)
        and item[0].dim() == 3
        and item[0].is_floating_point()
    )


def _limited(dataset: Dataset[Item], limit: int | None, seed: int) -> Dataset[Item]:
    if limit is None or limit >= len(dataset):  # type: ignore[arg-type]
        return dataset
    if isinstance(dataset, ImageSet):
        return dataset.limited(limit, seed)
    chosen = balanced_subset(_labels(dataset), limit, seed)
    return torch.utils.data.Subset(dataset, chosen.tolist())


def _labels(dataset: Any) -> Tensor:
    known = getattr(dataset, "targets", None)
    if known is None:
        known = [int(dataset[index][1]) for index in range(len(dataset))]
    return torch.as_tensor(known, dtype=torch.int64)


def _scan(folder: Path) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Image files with their labels, and the classes' names: the folder's folders, sorted."""
    layout = "expected CLASS/IMAGE.jpg (or .png, ...) in it"
    try:
        found = datasets.ImageFolder(str(folder), allow_empty=True)
    except FileNotFoundError as error:
        raise StiefelError(f"{folder} holds no class folders; {layout}") from error
    if not found.samples:
        raise StiefelError(f"{folder} holds no images; {layout}")
    if len(found.classes) == 1:
        raise StiefelError(f"{folder} holds one class only, '{found.classes[0]}'; two are needed")
    if empty := sorted(set(range(len(found.classes))) - {label for _, label in found.samples}):
        raise StiefelError(f"{folder / found.classes[empty[0]]} holds no images; {layout}")
    return found.samples, tuple(found.classes)


def _files(files: list[tuple[str, int]], channels: int) -> _Source:
    names = [file for file, _ in files]
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return _Source(lambda index: _read_image(names[index], channels), labels)


def _read_image(file: str, channels: int) -> Tensor:
    """uint8 (channels, h, w)."""
    try:
        with Image.open(file) as image:
            grey = image.mode in ("1", "L", "LA")
            if image.mode.startswith(("I", "F")):
                raise StiefelError(f"image {file} has more than 8 bits a channel; convert it to 8")
            if channels == 1 and not grey:
                raise StiefelError(f"image {file} is in colour, the model expects 1 channel")
            return VF.pil_to_tensor(image.convert(_MODES[channels]))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StiefelError(f"cannot read image {file}: {error}") from error


def _input_like(file: str) -> InputSpec:
    """What suits a folder of such images: their own size if small, else ImageNet's."""
    with Image.open(file) as image:
        channels = 1 if image.mode in ("1", "L") else 3
        if max(image.size) > SMALL_SIDE:
            return InputSpec.natural((channels, 224, 224), resize=256)
        return InputSpec.natural((channels, image.height, image.width))


def _in_memory(pixels: Tensor, labels: Tensor) -> _Source:
    return _Source(lambda index: pixels[index], labels)


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
