"""Command-line options made from settings classes, so that both bear the same names and words."""

from collections.abc import Callable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import click
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from converter.settings import Settings
from stiefel.validation import describe

S = TypeVar("S", bound=Settings)
Command = TypeVar("Command", bound=Callable[..., Any])


class _Leaf(NamedTuple):
    path: tuple[str, ...]  # field names from the settings class down
    field: FieldInfo

    def flag(self, prefix: str) -> str:
        return "-".join(part.replace("_", "-") for part in (*filter(None, [prefix]), *self.path))

    def parameter(self, prefix: str) -> str:
        return self.flag(prefix).replace("-", "_")


def settings_options(
    *models: type[Settings], prefix: str = "", exclude: tuple[str, ...] = ()
) -> Callable[[Command], Command]:
    """A decorator that gives a command one option for each field of the settings classes.

    Nested settings become options with the section's name before theirs. Options not given arrive
    as None, so that `collect` can tell them from given ones. A name that several classes share
    becomes one option.
    """

    def decorate(command: Command) -> Command:
        leaves: dict[str, _Leaf] = {}
        for model in models:
            for leaf in _leaves(model):
                if leaf.path[0] not in exclude:
                    leaves.setdefault(leaf.flag(prefix), leaf)
        for leaf in reversed(leaves.values()):
            command = _option(leaf, prefix)(command)
        return command

    return decorate


def collect(model: type[S], values: dict[str, Any], *, prefix: str = "", **fixed: Any) -> S:
    """The settings that the given options describe; `fixed` fields are set by the command itself.

    Raises:
        click.UsageError: a value doesn't fit; the message names the option.
    """
    document: dict[str, Any] = dict(fixed)
    for leaf in _leaves(model):
        value = values.get(leaf.parameter(prefix))
        if value is None or leaf.path[0] in fixed:
            continue
        place = document
        for section in leaf.path[:-1]:
            place = place.setdefault(section, {})
        place[leaf.path[-1]] = _parsed(value, leaf.field.annotation)
    try:
        return model.model_validate(document)
    except ValidationError as error:
        problem = error.errors()[0]
        location = [str(part) for part in problem["loc"] if isinstance(part, str)]
        option = "--" + "-".join([*filter(None, [prefix]), *location]).replace("_", "-")
        message = describe(problem, model)
        if isinstance(problem["input"], dict):  # several options that don't go together
            raise click.UsageError(message) from error
        message = message.split(": ", 1)[-1]
        raise click.UsageError(f"{option} {problem['input']!r}: {message}") from error


def given(model: type[Settings], values: dict[str, Any], *, prefix: str = "") -> list[str]:
    """Which options of this settings class the user has given."""
    return [
        f"--{leaf.flag(prefix)}"
        for leaf in _leaves(model)
        if values.get(leaf.parameter(prefix)) is not None
    ]


def _leaves(model: type[BaseModel]) -> Iterator[_Leaf]:
    """Every field that is a value, depth first; a literal tag such as `name` isn't the user's."""
    for name, field in model.model_fields.items():
        nested = _nested(field.annotation)
        if nested:
            for leaf in _leaves(nested):
                yield _Leaf((name, *leaf.path), leaf.field)
        elif not (get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1):
            yield _Leaf((name,), field)


def _nested(annotation: Any) -> type[BaseModel] | None:
    """The settings class that a field holds, if it holds one and no other."""
    found = [a for a in _alternatives(annotation) if isinstance(a, type)]
    found = [a for a in found if issubclass(a, BaseModel)]
    return found[0] if len(found) == 1 else None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(a for a in get_args(annotation) if a is not NoneType)
    return (annotation,)


def _option(leaf: _Leaf, prefix: str) -> Callable[[Command], Command]:
    flag, field = leaf.flag(prefix), leaf.field
    words = field.description or ""
    default = field.get_default(call_default_factory=True)
    if default is not None and not field.is_required():
        words += f"  [default: {_shown(default)}]"
    kinds = _alternatives(field.annotation)
    if kinds == (bool,):
        return click.option(f"--{flag}/--no-{flag}", default=None, help=words)
    choices = [c for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]
    if choices and all(get_origin(kind) is Literal for kind in kinds):
        optional = NoneType in get_args(field.annotation)
        names = [str(c) for c in choices] + (["none"] if optional else [])
        return click.option(f"--{flag}", type=click.Choice(names), default=None, help=words)
    metavar = "LIST" if any(get_origin(kind) is tuple for kind in kinds) else "VALUE"
    return click.option(f"--{flag}", metavar=metavar, default=None, help=words)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list | tuple):
        return ",".join(str(value) for value in default) or "none"
    return str(default)


def _parsed(value: Any, annotation: Any) -> Any:
    """An option's text as the value that pydantic checks; commas separate a list."""
    if not isinstance(value, str):
        return value
    kinds = _alternatives(annotation)
    lists = any(get_origin(kind) is tuple for kind in kinds)
    if value == "none":
        return () if lists and NoneType not in get_args(annotation) else None
    if lists:
        return [part.strip() for part in value.split(",") if part.strip()]
    if any(get_origin(kind) is dict for kind in kinds):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    return value
