"""A run goes on as it began, or not at all."""

from dataclasses import replace

import pytest
from torch.utils.data import Subset

from converter.errors import StiefelError
from tests.trainers.interrupting import InterruptAt, network, settings
from tests.trainers.short import Images
from trainers.data import Data, load_data
from trainers.rules import BP, SSA
from trainers.trainer import train_local


@pytest.mark.parametrize(
    ("model", "changes", "says"),
    [
        (lambda: network(width=32), {}, "of another architecture: 0.weight is .* in this model"),
        (lambda: network(factored=False), {"rule": BP()}, "begun with rule=ssa, not bp"),
        (network, {"settings": settings(lr=0.5)}, "begun with lr=0.002, not 0.5"),
        (network, {"rule": SSA(pool=2)}, "begun with pool=4, not 2"),
        (
            network,
            {"settings": settings(memory_format="contiguous")},
            "begun with memory_format=auto, not contiguous",
        ),
        (network, {"out": None}, "give the folder"),
    ],
)
def test_resuming_something_else_is_one_clear_error(interrupted, data, model, changes, says):
    before = (interrupted / "state.pt").read_bytes()
    rest = {"settings": settings(), "out": interrupted, **changes}
    with pytest.raises(StiefelError, match=says):
        train_local(model(), data, resume=True, **rest)
    assert (interrupted / "state.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "a.py:made"}, "begun on digits, not on a.py:made; resume as it was begun"),
        ({"name": "fake:1x8x8"}, "begun on digits, not on fake; resume as it was begun"),
        ({"tests": 39}, "begun with 40 test images, not with 39 test images; resume as"),
        ({"teacher": False}, "begun with a teacher, not without a teacher; resume as it was begun"),
        ({"shift": 1e-6}, "begun with the teacher of fingerprint .*, not with the teacher of"),
        ({"images": 16}, "begun with 80 training images, not with 16 training images; resume as"),
        ({"images": 96}, "begun with 80 training images, not with 96 training images; resume as"),
        ({"classes": tuple("0123456789a")}, "begun with 10 classes, not with 11 classes; resume"),
        ({"classes": tuple("0123456798")}, "begun with class 8 named '8', not with class 8 named"),
    ],
)
def test_resuming_with_other_data_or_without_that_teacher_is_one_clear_error(
    change, says, data, tmp_path
):
    def go_on(
        teacher=True, shift=0.0, images=80, tests=40, classes=data.classes, name="digits", **rest
    ):
        dense = network(factored=False) if teacher else None
        if shift:
            dense[0].bias.data[0] += shift
        train, test = Subset(data.train, range(images)), Subset(data.test, range(tests))
        chosen = Data(train, test, classes, name)
        rest = {"rule": SSA(feedback="fixed"), "settings": settings(), "out": tmp_path, **rest}
        return train_local(network(), chosen, teacher=dense, **rest)

    go_on(progress=InterruptAt(1, 2))
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(StiefelError, match=says) as refused:
        go_on(resume=True, **change)
    assert "\n" not in str(refused.value)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert not go_on(resume=True).interrupted


def test_what_worker_processes_draw_is_drawn_by_them_to_the_end(data, tmp_path):
    rest = {"rule": BP(), "out": tmp_path}
    drawing = replace(data, train=Images([0, 1] * 24))
    begun = settings(batch_size=16, workers=0)
    train_local(network(), drawing, settings=begun, progress=InterruptAt(1, 2), **rest)
    with pytest.raises(StiefelError, match="begun with no workers to read images, not with worker"):
        train_local(
            network(), drawing, settings=settings(batch_size=16, workers=1), resume=True, **rest
        )
    unset = settings(batch_size=16, workers=None)  # which is none, for data of somebody's own
    assert not train_local(network(), drawing, settings=unset, resume=True, **rest).interrupted


def test_a_run_goes_on_with_or_without_augmentation_as_it_began(interrupted):
    plain = load_data("digits", limit_train=96, limit_test=40, augment=False)
    with pytest.raises(StiefelError, match="begun with augmentation, not without augmentation"):
        train_local(network(), plain, settings=settings(), out=interrupted, resume=True)


def test_a_data_file_may_have_moved_and_no_other_factory_be_meant(data, tmp_path):
    rest = {"settings": settings(), "out": tmp_path}
    first = replace(data, name="/a/images.py:train")
    train_local(network(), first, progress=InterruptAt(1, 2), **rest)
    other = replace(data, name="/a/images.py:other")
    with pytest.raises(StiefelError, match=r"on images.py:train, not on images.py:other; resume"):
        train_local(network(), other, resume=True, **rest)
    moved = replace(data, name="b/images.py:train")
    assert not train_local(network(), moved, resume=True, **rest).interrupted


def test_a_run_without_a_teacher_is_not_gone_on_with_one(interrupted, data):
    rest = {"settings": settings(), "out": interrupted, "resume": True}
    with pytest.raises(StiefelError, match="begun without a teacher, not with a teacher; resume"):
        train_local(network(), data, teacher=network(factored=False), **rest)
