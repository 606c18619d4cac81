"""Writing files so that a reader sees the whole new file or the old one, never a part."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converter.errors import StiefelError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success move it there, on any error remove it.

    Companion files that share the temporary's stem are the caller's to handle.

    Raises:
        StiefelError: the folder doesn't exist or can't be written, or the disk is full.
    """
    target = check_place(path)
    # A unique name lets two writers race without seeing each other's half-written file.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # what the user's umask says
        yield temporary
        temporary.chmod(mode)  # some writers make a private file of it
        os.replace(temporary, target)
    except OSError as error:
        raise StiefelError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path: str | Path) -> Path:
    """The path, if a file could be written there: asked before long work, not after it.

    Raises:
        StiefelError: it is a folder, or its folder doesn't exist or can't be written.
    """
    target = Path(path)
    if target.is_dir():
        raise StiefelError(f"{target} is a folder; name a file to write")
    if not target.parent.is_dir():
        raise StiefelError(f"cannot write {target}: folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK):
        raise StiefelError(f"cannot write {target}: folder {target.parent} is not writable")
    return target


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
