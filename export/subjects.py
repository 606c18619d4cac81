"""The models that are compared: where they come from, and the one input that all of them take."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from converter.errors import StiefelError
from converter.specs import spec_of
from export import parity
from export.compact import compact
from export.runtimes import Subject
from export.safetensors import open_model

Source = nn.Module | Path | str


def subjects_of(
    models: Mapping[str, Source] | Sequence[Source], modules: Mapping[str, nn.Module]
) -> list[Subject]:
    """The models to be timed, by name.

    Args:
        modules: for a name whose source is an ONNX file, the module that torch's runtimes take.

    Raises:
        StiefelError: there is none, or a source can't be read.
    """
    if not isinstance(models, Mapping):
        models = _named(models)
    if not models:
        raise StiefelError("name at least one model to time")
    return [_subject(name, source, modules.get(name)) for name, source in models.items()]


def _named(sources: Sequence[Source]) -> dict[str, Source]:
    named: dict[str, Source] = {}
    for source in sources:
        name = type(source).__name__ if isinstance(source, nn.Module) else str(source)
        count = sum(1 for other in named if other == name or other.startswith(f"{name} #"))
        named[f"{name} #{count + 1}" if count else name] = source
    return named


def _subject(name: str, source: Source, module: nn.Module | None) -> Subject:
    if isinstance(source, nn.Module):
        return Subject(name, module=compact(source).cpu().float())
    path = Path(source)
    if path.suffix == ".onnx":
        count = len(parity.session(path).get_inputs())  # says now what is wrong with the file
        if count != 1:
            raise StiefelError(f"{path} takes {count} inputs; bench gives a model one, its images")
        return Subject(name, module=None if module is None else compact(module).cpu(), onnx=path)
    start = time.perf_counter()
    small = compact(open_model(source)).cpu().float()
    size = path.stat().st_size if path.is_file() else None
    return Subject(name, small, load_seconds=time.perf_counter() - start, file_size_bytes=size)


def input_shape(
    subjects: list[Subject], example: Tensor | None, size: int | None
) -> tuple[int, ...]:
    """One image's shape, which all models must take.

    Raises:
        StiefelError: they take different inputs, or none says what it takes.
    """
    chosen = example is not None or size is not None
    known = {s.name: shape for s in subjects if (shape := _own_shape(s, chosen))}
    if example is not None:
        shape = tuple(example.shape[1:])
    elif known:
        # A free axis (0) takes what another model says.
        shape = max(known.values(), key=lambda shape: sum(axis > 0 for axis in shape))
    else:
        raise StiefelError("give an example input: no model says what it takes")
    if size is not None:
        shape = (*shape[:-2], size, size)
    if not all(shape):
        raise StiefelError("the models take any image size: name one (--image-size)")
    for name, other in known.items():
        fits = len(other) == len(shape) and all(
            a in (0, b) for a, b in zip(other, shape, strict=True)
        )
        if not fits:
            takes = "×".join(str(axis or "any") for axis in other)
            raise StiefelError(
                f"{name} takes inputs of {takes}, not {'×'.join(map(str, shape))}: compare models "
                "of the same input, or name an image size that all take"
            )
    return shape


def _own_shape(subject: Subject, chosen: bool) -> tuple[int, ...] | None:
    """What the model says it takes, 0 for an axis of any size.

    A module's image size is but its usual one: it gives way where the user has `chosen` another.
    """
    if subject.onnx is not None:
        axes = parity.session(subject.onnx).get_inputs()[0].shape[1:]
        return tuple(axis if isinstance(axis, int) else 0 for axis in axes)
    if (spec := spec_of(subject.module)) is None:
        return None
    shape = tuple(spec.input.shape)
    return (shape[0], *(0 for _ in shape[1:])) if chosen else shape
