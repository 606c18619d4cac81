"""Pydantic's complaints, turned into one line that names the key, its line, and the right one."""

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from converter.errors import did_you_mean

Location = tuple[int | str, ...]


def describe(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    """One line on one of `ValidationError.errors()`, with the nearest right key for a wrong one."""
    location = problem["loc"]
    key = ".".join(written(location, model))
    if problem["type"] == "extra_forbidden":
        _, owner = _walk(location[:-1], model)
        names = sorted({name for candidate in _models(owner) for name in candidate.model_fields})
        hint = did_you_mean(str(location[-1]), names, count=1)
        known = f"; known here: {', '.join(names)}"
        return f"unknown key '{key}'{hint or known}"
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    if problem["type"].startswith("union_tag"):
        tags = sorted(str(_tag(candidate)) for candidate in _models(_walk(location, model)[1]))
        return _wrong_tag(key, problem, tags)
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], Mapping):  # a section whose values don't go together
        return f"{key}: {message}" if key else message
    return f"'{key}' is {problem['input']!r}: {message[:1].lower()}{message[1:]}"


def _wrong_tag(key: str, problem: Mapping[str, Any], tags: list[str]) -> str:
    """A section that says by its name which of several it is, and doesn't, or says another."""
    if problem["type"] == "union_tag_invalid":
        tag = problem["ctx"]["tag"]
        hint = did_you_mean(tag, tags) or f"; known here: {', '.join(tags)}"
        return f"'{key}.name' is '{tag}'{hint}"
    for given in map(str, problem["input"]):
        if hint := did_you_mean(given, ["name"]):
            return f"unknown key '{key}.{given}'{hint}"
    return f"'{key}' needs a name: one of {', '.join(tags)}"


def written(location: Location, model: type[BaseModel]) -> list[str]:
    """The keys of a location as they stand in a document."""
    return [str(key) for key in _walk(location, model)[0]]


def line_of(node: yaml.Node | None, location: Location) -> int | None:
    """The line, from 1, of the deepest part of the location that stands in the document."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if pair is None:
                continue
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _walk(location: Location, model: type[BaseModel]) -> tuple[list[int | str], Any]:
    """The location as written, without the tags that unions add, and what may stand there."""
    names: list[int | str] = []
    annotation: Any = model
    for part in location:
        candidates = list(_models(annotation))
        field = next((m.model_fields[part] for m in candidates if part in m.model_fields), None)
        tagged = next((m for m in candidates if _tag(m) == part), None)
        if field is None and tagged is not None:
            annotation = tagged
            continue
        names.append(part)
        annotation = field.annotation if field else None
    return names, annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every settings class in an annotation, through Optional, Union and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _models(argument)


def _tag(model: type[BaseModel]) -> Any:
    """The value by which a discriminated union knows this model."""
    field = model.model_fields.get("name")
    return field.default if field else None
