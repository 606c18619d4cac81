"""A run's folder: where it lies, what it holds so far, and which recipe may go on with it."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converter.errors import StiefelError
from converter.files import write_text
from stiefel.recipe import Recipe, resolved, save_recipe

STATE = "state.json"
# Sections in the order of their stages: whose figures say that one is done, and the folder whose
# training state says that it has begun.
_STAGES = {
    "pretrain": ("dense", "pretraining"),
    "convert": ("converted", None),
    "train": ("trained", "training"),
    "export": ("export", None),
    "bench": ("bench", None),
}


def default_folder(recipe: Recipe) -> Path:
    """`runs/NAME`, or the first of `runs/NAME-2`, … that doesn't exist yet."""
    base = Path("runs") / recipe.name
    candidates = (base, *(base.with_name(f"{base.name}-{k}") for k in range(2, 10_000)))
    return next(folder for folder in candidates if not folder.exists())


def resume_command(recipe_file: Path, changes: Sequence[str], folder: Path) -> str:
    """The line that goes on with an interrupted run, to be pasted in a shell."""
    sets = [word for change in changes for word in ("--set", change)]
    return shlex.join(["stiefel", "run", str(recipe_file), *sets, "--out", str(folder), "--resume"])


def open_folder(folder: Path, recipe: Recipe, *, resume: bool) -> dict[str, Any]:
    """The figures of an earlier, interrupted run, or none in a new folder.

    The recipe may differ from the one that the run began with in what has not begun yet.

    Raises:
        StiefelError: the folder can't be made or written, holds something else, or there is
            nothing to resume in it; it is left as it was.
    """
    if folder.exists() and not folder.is_dir():
        raise StiefelError(f"{folder} is a file; name a folder for the run")
    if resume:
        figures = _figures_so_far(folder, recipe)
    elif folder.is_dir() and any(folder.iterdir()):
        raise StiefelError(f"{folder} is not empty; name another --out, or go on with --resume")
    else:
        figures = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StiefelError(f"cannot make the run folder {folder}: {error.strerror}") from error
    keep(folder, recipe, figures)
    save_recipe(recipe, folder / "recipe.yaml")
    return figures


def keep(folder: Path, recipe: Recipe, figures: dict[str, Any]) -> None:
    """Write down what `open_folder` needs to go on from here."""
    write_text(folder / STATE, json.dumps({"recipe": resolved(recipe), "figures": figures}))


def _figures_so_far(folder: Path, recipe: Recipe) -> dict[str, Any]:
    state = folder / STATE
    if not state.is_file():
        raise StiefelError(f"nothing to resume: there is no {state}")
    try:
        kept = json.loads(state.read_text(encoding="utf-8"))
        before, figures = dict(kept["recipe"]), dict(kept["figures"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StiefelError(f"{state} can't be read; start anew in another --out") from error
    now = resolved(recipe)
    for section in _held(folder, figures, now):
        if before.get(section) != now[section]:
            stage, training = _STAGES.get(section, ("", None))
            anew = stage not in figures and _has_begun(folder, training)
            remedy = f"remove {folder / training} to train anew" if anew else "name another --out"
            raise StiefelError(
                f"{folder} holds a run of another recipe: its {section} differs; resume with the "
                f"same, or {remedy}"
            )
    return figures


def _held(folder: Path, figures: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    """The sections that what the folder holds was made by, those of skipped stages among them."""
    begun = [
        section
        for section, (stage, training) in _STAGES.items()
        if stage in figures or _has_begun(folder, training)
    ]
    if not begun:
        return []
    order = list(_STAGES)
    later = order[order.index(begun[-1]) + 1 :]
    return [section for section in recipe if section not in later]


def _has_begun(folder: Path, training: str | None) -> bool:
    """Whether there is a training to go on with."""
    return training is not None and (folder / training / "state.pt").exists()
