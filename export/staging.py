"""Writing a file that may have a companion, so that a reader never sees a part of either."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converter.errors import StiefelError


@contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """Yield a path of the same name in a hidden folder beside `path`; publish what lies there.

    A companion (`NAME.data`, ONNX's external data) is published with it. On any error the folder
    goes and the old files stay. Where an old pair must be replaced, the old model is removed before
    its data changes: an interruption may leave no model, never one with another's data.

    Raises:
        StiefelError: the folder doesn't exist or can't be written, or the disk is full.
    """
    target = Path(path)
    if target.is_dir():
        raise StiefelError(f"{target} is a folder; name a file to write")
    if not target.parent.is_dir():
        raise StiefelError(f"cannot write {target}: folder {target.parent} does not exist")
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield folder / target.name
        _publish(folder / target.name, target)
    except OSError as error:
        raise StiefelError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def companion(path: Path) -> Path:
    """Where the external data of the ONNX file `path` lies."""
    return path.with_name(path.name + ".data")


def _publish(new: Path, target: Path) -> None:
    if companion(new).exists():
        target.unlink(missing_ok=True)
        os.replace(companion(new), companion(target))
        os.replace(new, target)
    else:
        os.replace(new, target)
        companion(target).unlink(missing_ok=True)
