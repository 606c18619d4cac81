"""What a run began with, which its continuation is held to: settings, rule, data and teacher."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from converter.errors import StiefelError
from trainers.data import Data
from trainers.image_set import ImageSet, plain
from trainers.rules import RuleSettings
from trainers.settings import TrainSettings
from trainers.sources import KINDS

# What may differ between a run and its continuation: nothing that changes the result on a CPU.
_FREE = {
    "device",
    "workers",
    "log_every",
    "early_stop",
    "deterministic",
    "cuda_graph",
    "overlap",
    "diagnostics",
}


def origin(
    settings: TrainSettings, rule: RuleSettings, data: Data, teacher: nn.Module | None
) -> dict[str, Any]:
    """All that decides what a run comes to, as plain data to be kept with its state."""
    return {
        "settings": settings.model_dump(mode="json"),
        "rule_settings": rule.model_dump(mode="json"),
        "materials": _materials(settings, data, teacher),
    }


def check_origin(kept: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with anything but what the run in the folder `path` began with.

    Args:
        kept: the run's state, which holds its `origin`.
        now: the `origin` of what would go on.

    Raises:
        StiefelError: names the first setting, or the first of data and teacher, that differs.
    """
    _check_same(kept["settings"], now["settings"], path)
    _check_same(kept["rule_settings"], now["rule_settings"], path)
    _check_materials(kept["materials"], now["materials"], path)


def _check_same(kept: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    # The rule's name first: another rule's settings differ anyway.
    for key in sorted({*kept, *now} - _FREE, key=lambda key: (key != "name", key)):
        if kept.get(key) != now.get(key):
            what = "rule" if key == "name" else key
            raise StiefelError(
                f"{path} was begun with {what}={kept.get(key)}, not {now.get(key)}; "
                "resume with the same settings, or choose another folder"
            )


def _materials(settings: TrainSettings, data: Data, teacher: nn.Module | None) -> dict[str, Any]:
    """What tells data and teacher from others that would train otherwise, as plain data."""
    return {
        "data": _without_folder(data.name),
        "augmented": getattr(data.train, "augment", None) is not None,
        "teacher": None if teacher is None else _fingerprint(teacher),
        "images": len(data.train),
        "test_images": len(data.test),
        "classes": [str(name) for name in data.classes],
        "by_workers": _by_workers(settings, data),
    }


def _by_workers(settings: TrainSettings, data: Data) -> bool:
    """Whether worker processes draw what a data set of somebody's own draws at random."""
    return bool(settings.workers) and not isinstance(plain(data.train), ImageSet)


def _without_folder(data: str) -> str:
    """The name of a kind of data, or of a factory and its file, which may have moved."""
    kind, colon, rest = data.partition(":")
    return kind if kind in KINDS else f"{Path(kind).name}{colon}{rest}"


def _fingerprint(network: nn.Module) -> str:
    """What tells a network's weights from others, wherever they lie."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _check_materials(kept: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    for begun, here in zip(_described(kept), _described(now), strict=False):
        if begun != here:
            raise StiefelError(
                f"{path} was begun {begun}, not {here}; resume as it was begun, or choose another "
                "folder"
            )


def _described(materials: Mapping[str, Any]) -> list[str]:
    """In words; whether there is a teacher before which, how many classes before their names."""
    classes = materials["classes"]
    return [
        f"on {materials['data']}",
        f"{'with' if materials['augmented'] else 'without'} augmentation",
        f"with {'worker processes' if materials['by_workers'] else 'no workers'} to read images",
        "with a teacher" if materials["teacher"] else "without a teacher",
        f"with the teacher of fingerprint {materials['teacher']}",
        f"with {materials['images']} training images",
        f"with {materials['test_images']} test images",
        f"with {len(classes)} classes",
        *(f"with class {label} named '{name}'" for label, name in enumerate(classes)),
    ]
