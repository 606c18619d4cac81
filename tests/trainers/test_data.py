"""Data sets by name or folder, and one clear line for each that can't be used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from converter.errors import StiefelError
from converter.specs import InputSpec
from trainers.data import Data, ImageSet, batches, examples, images, load_data


def picture(path: Path, shade: int = 128, size: tuple[int, int] = (12, 10), mode: str = "RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, three training and two test images each; the shade tells which is which."""
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for k in range(count):
                picture(tmp_path / part / name / f"{k}.png", shade=100 * label + k)
    return tmp_path


def refused(spec: object, says: str, **options) -> None:
    def read() -> None:
        data = load_data(str(spec), **options)
        for part in (data.train, data.test):
            list(batches(part, 4, workers=0))

    with pytest.raises(StiefelError, match=says) as caught:
        read()
    assert "\n" not in str(caught.value)


# The embedded digits


def test_the_digits_are_split_the_same_every_time_and_stratified():
    data, again = load_data("digits", augment=False), load_data("digits", augment=False, seed=5)
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.classes == tuple("0123456789")
    counts = data.test.labels.bincount()
    assert counts.min() == counts.max() == 36
    for part in ("train", "test"):
        x, y = getattr(data, part).batch(range(50))
        assert x.shape == (50, 1, 8, 8)
        other, labels = getattr(again, part).batch(range(50))
        assert torch.equal(x, other)
        assert torch.equal(y, labels)


def test_no_digit_is_in_both_parts():
    from sklearn.datasets import load_digits

    data = load_data("digits", augment=False)
    held = [data.train.batch(range(1437)), data.test.batch(range(360))]
    found = sorted(tuple(row) for x, _ in held for row in x.flatten(1).mul(1e3).round().tolist())
    spec = data.train.spec
    pixels = torch.from_numpy(np.rint(load_digits().data * (255 / 16))).float() / 255
    whole = (pixels - spec.mean[0]) / spec.std[0]
    assert found == sorted(map(tuple, whole.mul(1e3).round().tolist()))


def test_limits_are_even_over_the_classes_and_seeded():
    data = load_data("digits", limit_train=55, limit_test=20, seed=3)
    assert sorted(data.train.labels.bincount().tolist()) == [5] * 5 + [6] * 5
    assert data.test.labels.bincount().tolist() == [2] * 10
    x, _ = data.test.batch(range(20))
    assert torch.equal(x, load_data("digits", limit_test=20, seed=3).test.batch(range(20))[0])
    assert not torch.equal(x, load_data("digits", limit_test=20, seed=4).test.batch(range(20))[0])


# Folders of images


@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation"])
def test_a_folder_of_images_takes_its_test_part_by_any_usual_name(folder, held_out):
    (folder / "test").rename(folder / held_out)
    data = load_data(f"imagefolder:{folder}", augment=False)
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.train.spec.shape == (3, 10, 12)
    x, _ = data.test.batch([3])
    red = x[0, 0] * data.test.spec.std[0] + data.test.spec.mean[0]
    torch.testing.assert_close(red, torch.full((10, 12), 101 / 255))


def test_a_bare_folder_of_classes_is_a_test_set(folder):
    data = load_data(f"imagefolder:{folder / 'train'}")
    assert (len(data.train), len(data.test)) == (0, 6)


def test_test_classes_are_numbered_as_in_training(folder):
    for file in (folder / "test" / "cat").iterdir():
        file.unlink()
    (folder / "test" / "cat").rmdir()
    picture(folder / "train" / "ant" / "0.png")
    picture(folder / "test" / "ant" / "0.png")
    data = load_data(f"imagefolder:{folder}")
    assert data.classes == ("ant", "cat", "dog")
    assert data.test.labels.tolist() == [0, 2, 2]


def test_a_test_part_may_be_of_one_class(folder):
    for file in (folder / "test" / "cat").iterdir():
        file.unlink()
    (folder / "test" / "cat").rmdir()
    data = load_data(f"imagefolder:{folder}")
    assert set(data.test.labels.tolist()) == {1}


def test_a_path_names_no_source(tmp_path):
    refused(tmp_path, "unknown data '")


def test_images_are_fitted_to_what_the_model_expects(folder):
    spec = InputSpec.natural((3, 8, 8))
    x, _ = load_data(f"imagefolder:{folder}", input=spec).train.batch([0, 1])
    assert x.shape == (2, 3, 8, 8)


def test_grey_images_feed_one_channel_or_three(tmp_path):
    for label in "ab":
        for k in range(2):
            picture(tmp_path / label / f"{k}.png", mode="L")
    x, _ = load_data(f"imagefolder:{tmp_path}").test.batch([0])
    assert x.shape == (1, 1, 10, 12)
    colour = InputSpec.natural((3, 10, 12))
    x, _ = load_data(f"imagefolder:{tmp_path}", input=colour).test.batch([0])
    assert x.shape == (1, 3, 10, 12)


def test_folders_that_cannot_be_used_are_named(folder, tmp_path):
    refused(f"imagefolder:{folder / 'gone'}", "no folder .*gone")
    refused("imagefolder:", "write imagefolder:DIR")
    (folder / "empty").mkdir()
    refused(f"imagefolder:{folder / 'empty'}", "empty holds no class folders; expected CLASS/IMAGE")
    (folder / "train" / "eel").mkdir()
    refused(f"imagefolder:{folder}", "eel holds no images")
    (folder / "train" / "eel").rmdir()
    picture(folder / "test" / "cow" / "0.png")
    refused(f"imagefolder:{folder}", "test has a class 'cow' that .*train hasn't")
    refused(f"imagefolder:{folder / 'train'}", "in colour", input=InputSpec.plain((1, 10, 12)))
    refused(f"imagenet:{folder / 'train'}", "2 classes, not ImageNet's 1000")
    (folder / "test").rename(folder / "other")
    refused(f"imagefolder:{folder}", "train/ but no test/ or val/")


def test_one_class_is_too_few(tmp_path):
    picture(tmp_path / "cat" / "0.png")
    refused(f"imagefolder:{tmp_path}", "holds one class only, 'cat'")


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n truncated"])
def test_a_file_that_is_no_image_is_named_when_it_is_read(folder, part, content):
    (folder / part / "dog" / "1.png").write_bytes(content)
    refused(f"imagefolder:{folder}", rf"cannot read image .*{part}.dog.1\.png")


def test_a_truncated_jpeg_is_named_from_worker_processes_too(folder):
    broken = folder / "train" / "dog" / "9.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(broken)
    broken.write_bytes(broken.read_bytes()[:5000])
    spec = InputSpec.natural((3, 128, 128))
    train = load_data(f"imagefolder:{folder}", input=spec).train
    assert not train.in_memory
    for workers in (0, 1):
        with pytest.raises(StiefelError, match=r"cannot read image .*9\.jpg") as caught:
            list(batches(train, 4, workers=workers))
        assert "\n" not in str(caught.value)


def test_sixteen_bit_images_are_refused(folder):
    deep = np.zeros((10, 12), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "train" / "dog" / "1.png")
    refused(f"imagefolder:{folder}", "more than 8 bits")


@pytest.mark.slow
def test_the_real_images_have_ten_classes(cifar_folder):
    data = load_data(f"imagefolder:{cifar_folder}")
    assert len(data.classes) == 10
    x, y = data.train.batch(range(64))
    assert x.shape == (64, 3, 32, 32)
    assert y.max() < 10
    assert x.std() > 0.3


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_absent_cifar_files_are_named(kind, tmp_path):
    refused(f"{kind}:{tmp_path}", r"no cifar-.* in .*; unpack cifar-.*\.tar\.gz there")
    inner = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[kind]
    (tmp_path / inner).mkdir()
    refused(f"{kind}:{tmp_path}", f"{kind} in .* is incomplete or corrupt")
    refused(f"{kind}:{tmp_path}", "has 3 channels", input=InputSpec.plain((1, 8, 8)))


# Noise, and data sets of one's own


def test_fake_images_repeat_and_tell_their_classes_apart():
    data = load_data("fake:3x16x20:4", augment=False)
    assert data.classes == ("0", "1", "2", "3")
    x, y = data.train.batch(range(40))
    assert x.shape == (40, 3, 16, 20)
    assert torch.equal(x, load_data("fake:3x16x20:4", augment=False).train.batch(range(40))[0])
    centres = torch.stack([x[y == label].mean(0) for label in range(4)])
    probe, labels = data.test.batch(range(40))
    nearest = torch.cdist(probe.flatten(1), centres.flatten(1)).argmin(1)
    assert (nearest == labels).float().mean() > 0.95


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("digtis", "did you mean digits"),
        ("fake", "write fake:CxHxW"),
        ("fake:3x8", "3x8"),
        ("fake:3x8x8:1", "2 or more"),
        ("fake:2x8x8", "images have 1, 3 or 4"),
    ],
)
def test_a_misspelt_source_is_one_clear_line(spec, says):
    refused(spec, says)


def test_images_of_fixed_size_are_not_stretched_to_a_model():
    refused("digits", "1x8x8, the model expects 3x32x32", input=InputSpec.natural((3, 32, 32)))


@pytest.mark.parametrize("option", ["limit_train", "limit_test"])
def test_a_limit_of_nothing_is_refused(option):
    refused("digits", f"{option} must be at least 1", **{option: 0})


FACTORY = """
import torch
from torch.utils.data import TensorDataset

def pair():
    x = torch.arange(24 * 48.0).view(24, 3, 4, 4)
    y = torch.arange(24) % 3
    return TensorDataset(x, y), TensorDataset(x[:6], y[:6])

def raw():
    train, test = pair()
    train.targets = ["ant", "bee", "cow"] * 8
    return train, test

def named():
    return (*pair(), ["ant", "bee", "cow"])

def whole():
    from trainers.data import Data
    return Data(*pair(), ("a", "b", "c"), "mine")

def miscounted():
    return (*pair(), 7)

def empty():
    return [part.__class__(*(t[:0] for t in part.tensors)) for part in pair()]

def wrong():
    return 5

def flat():
    x = torch.zeros(4, 7)
    return TensorDataset(x, torch.zeros(4)), TensorDataset(x, torch.zeros(4))

def halves():
    x = torch.zeros(4, 3, 4, 4)
    return TensorDataset(x, torch.zeros(4) + 0.5), TensorDataset(x, torch.zeros(4) + 0.5)

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])

def streams():
    return Stream(), Stream()

def fails():
    raise OSError("the disk is on fire")

class Torn(torch.utils.data.Dataset):
    def __init__(self, length=4):
        self.length = length
    def __len__(self):
        if self.length is None:
            raise NotImplementedError("no length")
        return self.length
    def __getitem__(self, index):
        raise OSError("the page is torn\\nfrom end to end")

def torn():
    return Torn(), Torn(), ["a", "b"]

def endless():
    return Torn(None), Torn(None), ["a", "b"]

def huge():
    x = torch.zeros(4, 3, 4, 4)
    return TensorDataset(x, torch.arange(4) * 2**40), TensorDataset(x, torch.arange(4))

def soft():
    x = torch.zeros(4, 3, 4, 4)
    return TensorDataset(x, torch.rand(4, 3)), TensorDataset(x, torch.rand(4, 3))

def mapped():
    return [{"x": 1, "y": 2}] * 4, [{"x": 1, "y": 2}] * 4
"""


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    return tmp_path / "mine.py"


def test_a_factory_gives_data_sets_of_one_s_own(factory):
    made = {"pair": "012", "raw": "012", "named": ("ant", "bee", "cow"), "whole": "abc"}
    for name, classes in made.items():
        data = load_data(f"{factory}:{name}", limit_train=9)
        assert data.classes == tuple(classes)
        labels = [int(data.train[i][1]) for i in range(len(data.train))]
        assert sorted(labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert len(data.test) == 6


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wrong", "returned a int, not"),
        ("streams", "returned a Stream; data sets need a length and items"),
        ("miscounted", "returned a int as third item, not the classes' names"),
        ("empty", "has no training images, and names no classes"),
        ("flat", "must give items"),
        ("halves", "int label"),
        ("fails", "the disk is on fire"),
        ("torn", "the data set failed: OSError: the page is torn from end to end"),
        ("endless", "the data set failed: NotImplementedError: no length"),
        ("huge", "is no number of a class; count them from 0, or return the classes' names"),
        ("soft", "must give items"),
        ("mapped", "must give items"),
        ("gone", "gone"),
    ],
)
def test_a_factory_that_fails_is_one_clear_line(factory, name, says):
    refused(f"{factory}:{name}", says)


def test_a_factory_s_images_must_fit_the_model(factory):
    refused(f"{factory}:pair", "3x4x4, the model expects 3x8x8", input=InputSpec.natural((3, 8, 8)))


def test_examples_are_plain_even_over_the_classes_and_labelled(factory):
    data = load_data("digits")
    x, y = examples(data.train, 30, seed=1)
    assert y.bincount().tolist() == [3] * 10
    assert torch.equal(x, images(data.train, 30, seed=1))
    plain = load_data("digits", augment=False).train
    known = {tuple(row) for row in plain.batch(range(len(plain)))[0].flatten(1).tolist()}
    part = images(Subset(Subset(data.train, range(100)), range(50)), 30)
    for found in (x, part):
        assert all(tuple(row) in known for row in found.flatten(1).tolist())
    mine = load_data(f"{factory}:pair").train
    x, y = examples(mine, 100)
    assert len(x) == len(y) == 24
    for image, label in zip(x, y, strict=True):
        # Pixels count upwards, so each image tells its own index.
        assert int(image[0, 0, 0]) // 48 % 3 == label
    most_are_threes = Subset(data.train, [*range(200), *(data.train.labels == 3).nonzero()[:, 0]])
    drawn = [examples(most_are_threes, 30, seed)[1] for seed in (0, 1, 0)]
    assert [labels.bincount().tolist() for labels in drawn] == [[3] * 10] * 3
    picked = [images(most_are_threes, 30, seed) for seed in (0, 1, 0)]
    assert torch.equal(picked[0], picked[2])
    assert not torch.equal(picked[0], picked[1])
    with pytest.raises(StiefelError, match="the data set is empty"):
        examples(ImageSet(lambda i: None, torch.tensor([]), plain.spec), 3)


def test_data_is_what_the_trainer_takes():
    data = load_data("fake:1x8x8")
    assert isinstance(data, Data)
    assert data.name == "fake:1x8x8"
