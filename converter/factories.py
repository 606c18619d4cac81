"""User code by name: `FILE.py:factory` and `package.module:factory`.

A name that the user gives is run as it stands. A name that a checkpoint gives is run only where it
can be meant as a model: `refuse_unless_factory` keeps a downloaded file from naming `os:system`.
"""

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from converter.errors import StiefelError, did_you_mean


def absolute_name(name: str) -> str:
    """`FILE.py:factory` with the file's full path; other names unchanged."""
    module, _, attribute = name.rpartition(":")
    return f"{Path(module).resolve()}:{attribute}" if module.endswith(".py") else name


def import_factory(name: str) -> Callable[..., Any]:
    """The callable that `FILE.py:factory` or `package.module:factory` names.

    Raises:
        StiefelError: there is no such file, module or attribute, or importing it fails.
    """
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise StiefelError(f"'{name}' names no factory; write FILE.py:factory or package:factory")
    module = _import(module_name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = did_you_mean(part, [key for key in vars(found) if not key.startswith("_")])
            raise StiefelError(f"{module_name} has no '{attribute}'{near}")
        found = getattr(found, part)
    if not callable(found):
        raise StiefelError(f"{name} is not a function or class")
    return found


def call_factory(name: str, factory: Callable[..., Any], args: dict[str, Any]) -> Any:
    """`factory(**args)`, its failure turned into one line.

    Raises:
        StiefelError: the factory raised, or takes no argument of that name.
    """
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        parameters = {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in args:
        if parameters and not takes_any and key not in parameters:
            near = did_you_mean(key, parameters) or f"; it takes {', '.join(parameters)}"
            raise StiefelError(f"{name} takes no argument '{key}'{near}")
    try:
        with _importable(name.rpartition(":")[0]):
            return factory(**args)
    except StiefelError:
        raise
    except Exception as error:
        raise StiefelError(f"{name} failed: {_one_line(error)}") from error


def refuse_unless_factory(name: str, factory: Callable[..., Any]) -> None:
    """Refuse a callable that a checkpoint names but that isn't evidently meant to build a model.

    Anything outside the Python installation is the user's own; inside it (the standard library,
    installed packages) only `nn.Module` classes and functions annotated as returning one pass.

    Raises:
        StiefelError: the callable is something else.
    """
    if inspect.isclass(factory) and issubclass(factory, nn.Module):
        return
    try:
        source = Path(inspect.getfile(inspect.unwrap(factory))).resolve()
        installed = any(source.is_relative_to(folder) for folder in _installation())
    except TypeError:  # built in, so there is no file
        installed = True
    if installed and not _returns_module(factory):
        raise StiefelError(
            f"the checkpoint wants to run {name}, which isn't evidently a model; if you trust it, "
            "name the model yourself (--model)"
        )


def _installation() -> list[Path]:
    keys = ("stdlib", "platstdlib", "purelib", "platlib")
    return [Path(sysconfig.get_path(key)).resolve() for key in keys]


def _returns_module(factory: Callable[..., Any]) -> bool:
    try:
        returned = typing.get_type_hints(factory).get("return")
    except Exception:  # annotations may name anything
        return False
    return inspect.isclass(returned) and issubclass(returned, nn.Module)


def _import(module_name: str) -> ModuleType:
    if module_name.endswith(".py"):
        return _import_file(Path(module_name))
    try:
        with _importable(str(Path.cwd() / "here.py")):
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        hint = "; install it, or give a path FILE.py:factory" if missing in module_name else ""
        raise StiefelError(f"cannot import {module_name}: no module '{missing}'{hint}") from error
    except Exception as error:
        raise StiefelError(f"cannot import {module_name}: {_one_line(error)}") from error


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise StiefelError(f"there is no file {path}")
    # The time is in the name so that an edited file is read anew and an unchanged one isn't.
    name = f"_stiefel_{path.stem}_{abs(hash(path))}_{path.stat().st_mtime_ns}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importable(str(path)):
            spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise StiefelError(f"cannot import {path}: {_one_line(error)}") from error
    return module


@contextmanager
def _importable(file: str) -> Iterator[None]:
    """Let a file import its neighbours, as it could when run as a script."""
    if not file.endswith(".py"):
        yield
        return
    folder = str(Path(file).resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
