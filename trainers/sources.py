"""Where images come from: the embedded digits, CIFAR's files, folders of images, noise.

Each source gives uint8 images of any size with labels; `trainers.data` fits them to a model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional as VF

from converter.errors import StiefelError
from converter.specs import InputSpec, parse_shape
from trainers.image_set import SMALL_SIDE, Augmentation, balanced_subset

CHANNEL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_TEST_FOLDERS = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class Source:
    """Images before they are fitted to a model: how to read one, and their labels (N,)."""

    read: Callable[[int], Tensor]
    labels: Tensor


@dataclass(frozen=True)
class Sources:
    train: Source
    test: Source
    classes: tuple[str, ...]
    input: InputSpec  # what suits the data where no model says
    augment: Augmentation
    fixed_shape: bool = False  # resizing would make no sense


def _digits(rest: str, input: InputSpec | None) -> Sources:
    from sklearn.datasets import load_digits  # here, because it takes a second

    bundle = load_digits()
    pixels = torch.from_numpy(np.rint(bundle.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bundle.target.astype(np.int64))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[balanced_subset(labels, 360, seed=0)] = True
    return Sources(
        train=_in_memory(pixels[~held_out], labels[~held_out]),
        test=_in_memory(pixels[held_out], labels[held_out]),
        classes=tuple(map(str, bundle.target_names)),
        input=InputSpec.plain((1, 8, 8)),
        augment=Augmentation(shift=1, flip=False),  # a mirrored digit is another or none
        fixed_shape=True,
    )


def _cifar(kind: str, dataset: type[datasets.CIFAR10]) -> Callable[..., Sources]:
    def load(rest: str, input: InputSpec | None) -> Sources:
        if input is not None and input.shape[0] != 3:
            raise StiefelError(f"{kind} has 3 channels, the model expects {input.shape[0]}")
        root = Path(rest).expanduser()
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
        return Sources(
            train=_in_memory(_channels_first(train.data), torch.tensor(train.targets)),
            test=_in_memory(_channels_first(test.data), torch.tensor(test.targets)),
            classes=tuple(train.classes),
            input=InputSpec.natural((3, 32, 32)),
            augment=Augmentation(shift=4, flip=True),
        )

    return load


def _image_folder(rest: str, input: InputSpec | None) -> Sources:
    root = Path(rest).expanduser()
    if not root.is_dir():
        raise StiefelError(f"there is no folder {root}")
    test = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
    if (root / "train").is_dir():
        if test is None:
            raise StiefelError(f"{root} has train/ but no test/ or val/ beside it")
        train_files, classes = _scan(root / "train")
        test_files, test_classes = _scan(test, least=1)
        if strange := sorted(set(test_classes) - set(classes)):
            raise StiefelError(f"{test} has a class '{strange[0]}' that {root / 'train'} hasn't")
        known = {name: number for number, name in enumerate(classes)}
        test_files = [(file, known[test_classes[label]]) for file, label in test_files]
    else:
        train_files = []
        test_files, classes = _scan(test or root)
    expected = input or _input_like(test_files[0][0])
    channels, height, width = expected.shape
    return Sources(
        train=_files(train_files, channels),
        test=_files(test_files, channels),
        classes=classes,
        input=expected,
        # Grey images are mostly writing, and a mirrored letter is another or none.
        augment=Augmentation(shift=max(1, min(height, width) // 8), flip=channels > 1),
    )


def _imagenet(rest: str, input: InputSpec | None) -> Sources:
    sources = _image_folder(rest, input or InputSpec(resize=256))
    if len(sources.classes) != 1000:
        raise StiefelError(
            f"{rest} has {len(sources.classes)} classes, not ImageNet's 1000; for a part of it use "
            f"imagefolder:{rest}"
        )
    return sources


def _fake(rest: str, input: InputSpec | None) -> Sources:
    """Noise around one random pattern a class: learnable, but no data."""
    text, _, number = rest.partition(":")
    shape = parse_shape(text)
    if number and not (number.isdigit() and int(number) > 1):
        raise StiefelError(f"'fake:{rest}': the number of classes must be 2 or more")
    classes = int(number or 10)

    def source(first: int, count: int) -> Source:
        labels = torch.arange(first, first + count) % classes

        def read(index: int) -> Tensor:
            pattern = torch.Generator().manual_seed(int(labels[index]))
            noise = torch.Generator().manual_seed(2**32 + first + index)
            mean = torch.randint(64, 192, (shape[0], 4, 4), generator=pattern).float()
            mean = torch.nn.functional.interpolate(mean[None], shape[1:])[0]
            return (mean + 32 * torch.randn(shape, generator=noise)).clamp(0, 255).byte()

        return Source(read, labels)

    return Sources(
        train=source(0, max(500, 10 * classes)),
        test=source(10**6, max(200, 4 * classes)),
        classes=tuple(str(number) for number in range(classes)),
        input=InputSpec.natural(shape),
        augment=Augmentation(shift=max(1, min(shape[1:]) // 8), flip=False),
        fixed_shape=True,
    )


KINDS: dict[str, tuple[Callable[[str, InputSpec | None], Sources], str]] = {
    "digits": (_digits, ""),
    "cifar10": (_cifar("cifar10", datasets.CIFAR10), "DIR"),
    "cifar100": (_cifar("cifar100", datasets.CIFAR100), "DIR"),
    "imagenet": (_imagenet, "DIR"),
    "imagefolder": (_image_folder, "DIR"),
    "fake": (_fake, "CxHxW"),
}


def _scan(folder: Path, least: int = 2) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Image files with their labels, and the `least` classes' names or more: its folders."""
    layout = "expected CLASS/IMAGE.jpg (or .png, ...) in it"
    try:
        found = datasets.ImageFolder(str(folder), allow_empty=True)
    except FileNotFoundError as error:
        raise StiefelError(f"{folder} holds no class folders; {layout}") from error
    if not found.samples:
        raise StiefelError(f"{folder} holds no images; {layout}")
    if len(found.classes) < least:
        raise StiefelError(f"{folder} holds one class only, '{found.classes[0]}'; two are needed")
    if empty := sorted(set(range(len(found.classes))) - {label for _, label in found.samples}):
        raise StiefelError(f"{folder / found.classes[empty[0]]} holds no images; {layout}")
    return found.samples, tuple(found.classes)


def _files(files: list[tuple[str, int]], channels: int) -> Source:
    names = [file for file, _ in files]
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return Source(lambda index: _read_image(names[index], channels), labels)


def _read_image(file: str, channels: int) -> Tensor:
    """uint8 (channels, h, w)."""
    with _open(file) as image:
        grey = image.mode in ("1", "L", "LA")
        if image.mode.startswith(("I", "F")):
            raise StiefelError(f"image {file} has more than 8 bits a channel; convert it to 8")
        if channels == 1 and not grey:
            raise StiefelError(f"image {file} is in colour, the model expects 1 channel")
        return VF.pil_to_tensor(image.convert(CHANNEL_MODES[channels]))


def _input_like(file: str) -> InputSpec:
    """What suits a folder of such images: their own size if small, else ImageNet's."""
    with _open(file) as image:
        channels = 1 if image.mode in ("1", "L") else 3
        if max(image.size) > SMALL_SIDE:
            return InputSpec.natural((channels, 224, 224), resize=256)
        return InputSpec.natural((channels, image.height, image.width))


@contextmanager
def _open(file: str) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StiefelError(f"cannot read image {file}: {error}") from error


def _in_memory(pixels: Tensor, labels: Tensor) -> Source:
    return Source(lambda index: pixels[index], labels)


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
