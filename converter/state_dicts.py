"""Checkpoints from the wild: find the weights in a file, and fit them to a model.

`read_state` finds the weights in any of the usual nestings. `load_state` removes wrappers'
prefixes, applies the user's renames, and says plainly what doesn't fit.
"""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from converter.errors import StiefelError, did_you_mean
from converter.weight_files import read_file

Note = Callable[[str], None]

# Where training scripts put the weights, in order of preference.
_CONTAINERS = (
    *("state_dict", "model_state_dict", "model", "model_state", "module", "net", "network"),
    *("weights", "params", "student", "generator"),
)
_TRAINING = re.compile(r"optim|sched|scaler|^amp|criterion|loss|rng|random|^args|config|hyper")
_AVERAGED = re.compile(r"ema|swa|averag", re.IGNORECASE)
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Left behind by averaging and by FLOP counters; no part of any model.
_DEBRIS = re.compile(r"(?:^|\.)(?:n_averaged|total_ops|total_params)$")
_SHOWN = 3


def read_state(
    path: str | Path, *, variant: str | None = None, note: Note | None = None
) -> dict[str, Tensor]:
    """The weights in a checkpoint, on the CPU, in the dtypes they were saved in.

    Args:
        path: .safetensors, a .index.json of sharded files, .pt, .pth, .th, .bin or .ckpt.
        variant: which weights where the file holds several: a key such as "state_dict_ema", or
            part of one ("ema").
        note: called with a line on what was ignored; a warning if None.

    Raises:
        StiefelError: the file is missing, truncated, no checkpoint, needs code to open, or holds
            several sets of weights and none is evidently meant.
    """
    note = note or warnings.warn
    held = read_file(path)
    if isinstance(held, nn.Module) or not isinstance(held, Mapping):
        raise StiefelError(f"{path} holds a {type(held).__name__}, not a model's weights")
    found = dict(_weights(held))
    chosen = _choose(found, variant, path)
    others = [name for name in found if name and name != chosen]
    if variant is None and others:
        note(f"{path}: taking '{chosen}'; it also holds {_some(others)} (choose with variant)")
    ignored = [
        str(key) for key in held if str(key) != chosen.partition(".")[0] and key not in found
    ]
    if chosen and ignored:
        note(f"{path}: ignored {_some(ignored)}")
    state = {key: value.detach() for key, value in found[chosen].items() if _is_tensor(value)}
    if stray := [key for key, value in found[chosen].items() if not _is_tensor(value)]:
        note(f"{path}: ignored {_some(stray)}")
    return state


def versioned(model: nn.Module, state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """A state that fits the model, marked as of the model's own version (MNASNet asks for it)."""
    marked = OrderedDict(state)
    marked._metadata = model.state_dict()._metadata
    return marked


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    rename: Sequence[str] = (),
    ignore: Sequence[str] = (),
    source: str | Path = "the checkpoint",
    note: Note | None = None,
) -> None:
    """Copy `state` into the model, every tensor of it, converting to the model's dtypes.

    Prefixes of DataParallel, DDP, FSDP and `torch.compile` are removed, then `rename` is applied.

    Args:
        model: changed in place, or not at all if something doesn't fit.
        state: as `read_state` returns it.
        rename: 'REGEX=REPLACEMENT' rules (`re.sub`, in order); a key that becomes empty is dropped.
        ignore: prefixes of keys to leave out where the model has none such.
        source: what to call the checkpoint in messages.
        note: called with a line on what was ignored; a warning if None.

    Raises:
        StiefelError: keys are missing or unexpected, or shapes differ; the first few are named.
    """
    note = note or warnings.warn
    own = {k: v for k, v in model.state_dict(keep_vars=True).items() if _is_tensor(v)}
    state = _renamed(_unwrapped(state, own), rename, note)
    ignored = [key for key in state if key not in own and key.startswith((*ignore, "\0"))]
    if ignored:
        note(f"left out {_some(ignored)}")
    debris = {key for key in state if key not in own and _DEBRIS.search(key)} | set(ignored)
    state = {key: value for key, value in state.items() if key not in debris}
    if complaint := _misfit(own, state):
        raise StiefelError(f"{source} doesn't fit the model: {complaint}")
    _note_values(own, state, note)
    try:
        model.load_state_dict(versioned(model, state), strict=False)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise StiefelError(f"{source} doesn't fit the model: {text}") from error


def _weights(held: Mapping[Any, Any], path: str = "") -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Every mapping of names to tensors, by its dotted path; inner ones before the one around."""
    inner = [
        found
        for key, value in held.items()
        if isinstance(key, str) and isinstance(value, Mapping) and not _TRAINING.search(key)
        for found in _weights(value, f"{path}.{key}" if path else key)
    ]
    yield from inner
    # Tensors beside a whole set of weights are training state: a best accuracy, a step.
    if not inner and any(isinstance(k, str) and _is_tensor(v) for k, v in held.items()):
        yield path, {key: value for key, value in held.items() if isinstance(key, str)}


def _choose(found: Mapping[str, Any], variant: str | None, path: str | Path) -> str:
    if not found:
        raise StiefelError(f"{path} holds no weights: no mapping of names to tensors")
    if variant is not None:
        if variant in found:
            return variant
        matches = [name for name in found if variant.lower() in name.lower()]
        if len(matches) != 1:
            held = "several" if matches else "no"
            raise StiefelError(
                f"{path} holds {held} weights named '{variant}'; choose from "
                f"{', '.join(name or '(bare)' for name in matches or found)}"
            )
        return matches[0]
    plain = [name for name in found if not _AVERAGED.search(name)] or list(found)
    for container in _CONTAINERS:
        for name in plain:
            if name == container or name.startswith(container + "."):
                return name
    if len(plain) > 1:
        raise StiefelError(
            f"{path} holds several sets of weights; choose a variant from {', '.join(found)}"
        )
    return plain[0]


def _unwrapped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without wrappers' prefixes, unless the model itself has them."""
    state = {_WRAPPERS.sub("", key): value for key, value in state.items()}
    while not any(key.startswith("module.") for key in own):
        counted = [key for key in state if not _DEBRIS.search(key)]
        if not counted or not all(key.startswith("module.") for key in counted):
            break
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _renamed(state: dict[str, Tensor], rules: Sequence[str], note: Note) -> dict[str, Tensor]:
    for rule in rules:
        pattern, equals, replacement = rule.rpartition("=")
        if not equals or not pattern:
            raise StiefelError(f"rename '{rule}' must be written 'REGEX=REPLACEMENT'")
        try:
            names = {key: re.sub(pattern, replacement, key) for key in state}
        except re.error as error:
            raise StiefelError(f"rename '{rule}' is no regular expression: {error}") from error
        if all(new == old for old, new in names.items()):
            note(f"rename '{rule}' changed no key")
        renamed: dict[str, Tensor] = {}
        for old, new in names.items():
            if new in renamed:
                raise StiefelError(f"rename '{rule}' gives two tensors the name '{new}'")
            if new:
                renamed[new] = state[old]
        state = renamed
    return state


def _misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What keeps `state` from fitting, as one line; empty if nothing does."""
    # A tied tensor may be there under any one of its names; old files count no batches.
    present = {id(own[key]) for key in state if key in own}
    missing = [
        key
        for key, value in own.items()
        if key not in state and id(value) not in present and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in state if key not in own]
    wrong = [key for key in state if key in own and state[key].shape != own[key].shape]
    parts = []
    if missing:
        named = [key + _hint(key, unexpected, "the file has ") for key in missing[:_SHOWN]]
        parts.append(f"{len(missing)} missing: {_some(missing, named)}")
    if unexpected:
        named = [key + _hint(key, own, "the model has ") for key in unexpected[:_SHOWN]]
        parts.append(f"{len(unexpected)} unexpected: {_some(unexpected, named)}")
    if wrong:
        named = [
            f"{key} is {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
            for key in wrong[:_SHOWN]
        ]
        parts.append(f"{len(wrong)} of another shape: {_some(wrong, named)}")
    return "; ".join(parts) + _remedy(own, state, missing, unexpected, wrong) if parts else ""


def _remedy(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    wrong: list[str],
) -> str:
    if missing and unexpected and (first := unexpected[0].partition(".")[0]):
        prefix = first + "."
        if sum(key.removeprefix(prefix) in own for key in unexpected) > len(unexpected) / 2:
            return f"; most would fit with rename '^{re.escape(prefix)}='"
    heads = {key: state[key].shape for key in wrong if state[key].shape[1:] == own[key].shape[1:]}
    if wrong and len(heads) == len(wrong) and len({shape[0] for shape in heads.values()}) == 1:
        classes = next(iter(heads.values()))[0]
        return f"; if that is the classifier, build the model with num_classes={classes}"
    return ""


def _hint(key: str, options: Iterable[str], lead: str) -> str:
    near = did_you_mean(key, options, count=1)
    return near.replace("; did you mean ", f" ({lead}").replace("?", ")")


def _note_values(own: Mapping[str, Tensor], state: Mapping[str, Tensor], note: Note) -> None:
    differing = {
        str(value.dtype).removeprefix("torch.")
        for key, value in state.items()
        if value.is_floating_point() and key in own and own[key].dtype != value.dtype
    }
    if differing:
        note(f"weights saved as {', '.join(sorted(differing))} are converted to the model's dtype")
    floating = {key: value for key, value in state.items() if value.is_floating_point()}
    if broken := [key for key, value in floating.items() if not bool(value.isfinite().all())]:
        note(f"not all values are finite in {_some(broken)}")


def _some(names: Sequence[str], shown: Sequence[str] | None = None) -> str:
    """The first few, and how many more."""
    shown = shown if shown is not None else list(names[:_SHOWN])
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
