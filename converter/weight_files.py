"""Opening files of weights without running code from them: .safetensors, shards, torch pickles."""

import argparse
import collections
import difflib
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from converter.errors import StiefelError

# What training scripts save beside the weights and what can do no harm when rebuilt.
_HARMLESS = [
    argparse.Namespace,
    collections.defaultdict,
    dict,
    np.dtype,
    np.ndarray,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    np._core.multiarray.scalar,
    np._core.multiarray._reconstruct,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u1", "?")),
]


def read_file(path: str | Path) -> Any:
    """Whatever a checkpoint file holds, tensors on the CPU: usually a mapping, perhaps nested.

    Raises:
        StiefelError: the file is missing, truncated, corrupt or needs code to open.
    """
    path = Path(path)
    if not path.exists() and (index := path.with_name(path.name + ".index.json")).is_file():
        path = index
    if path.is_dir():
        raise StiefelError(f"{path} is a folder; name a checkpoint file in it")
    require_file(path)
    if path.suffix == ".json":
        return _read_shards(path)
    shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}(\.\w+)", path.name)
    if shard and (index := path.with_name(f"{shard[1]}{shard[2]}.index.json")).is_file():
        return _read_shards(index)
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    return _read_pickle(path)


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one .safetensors file, as copies, and its metadata.

    Names that `safetensors.torch.save_model` left out for sharing a tensor are put back.

    Raises:
        StiefelError: there is no such file, or it is truncated or corrupt.
    """
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        # Copies, because the originals are a window on the file, which may be replaced.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    for alias, kept in metadata.items():
        if kept in tensors and alias not in tensors:
            tensors[alias] = tensors[kept]
    return tensors, metadata


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """`safetensors.safe_open` on the CPU.

    Raises:
        StiefelError: there is no such file, or it is truncated or corrupt.
    """
    path = Path(path)
    require_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def require_file(path: Path) -> None:
    """Raise StiefelError if there is no such file, naming the nearest beside it."""
    if path.is_file():
        return
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    # By what comes before the ending, which many unrelated files share.
    names = {p.stem: p.name for p in siblings if p.suffix in (path.suffix, ".safetensors", ".pth")}
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.7)
    hint = f"; did you mean {names[near[0]]}?" if near else ""
    raise StiefelError(f"there is no file {path}{hint}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(names.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StiefelError(f"{index} is no index of a sharded checkpoint") from error
    tensors: dict[str, Tensor] = {}
    for file in files:
        if Path(file).name != file:
            raise StiefelError(f"{index} points outside its folder, to {file}")
        if not (index.parent / file).is_file():
            raise StiefelError(f"{index} names {file}, which isn't beside it; fetch that too")
        part = read_safetensors if file.endswith(".safetensors") else lambda p: (_read_pickle(p),)
        tensors |= part(index.parent / file)[0]
    if absent := [key for key in names if key not in tensors]:
        raise StiefelError(f"{index} promises {absent[0]}, which {names[absent[0]]} doesn't hold")
    return tensors


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)|Trying to (call|instantiate)|Can only", str(error)):
            raise _needs_code(path, found[1] or "a pickled object") from error
        raise _unreadable(path, error) from error
    except Exception as error:
        if "TorchScript" in str(error):
            raise _needs_code(path, "TorchScript") from error
        raise _unreadable(path, error) from error


def _needs_code(path: Path, culprit: str) -> StiefelError:
    return StiefelError(
        f"{path} holds more than weights ({culprit}), and opening it could run any code; where it "
        "was made, save only the weights: torch.save(model.state_dict(), FILE)"
    )


def _unreadable(path: Path, error: Exception) -> StiefelError:
    if isinstance(error, OSError) and error.strerror:
        return StiefelError(f"cannot read {path}: {error.strerror}")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return StiefelError(f"{path} is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        return StiefelError(f"{path} is only a Git LFS pointer; run git lfs pull")
    # What torch says of a pickle is a lecture, or a number.
    text = f" ({' '.join(str(error).split())})" if isinstance(error, SafetensorError) else ""
    return StiefelError(f"{path} is truncated or no checkpoint{text}; fetch it again")
