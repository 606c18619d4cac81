"""Our own checkpoints: one .safetensors file that says how to rebuild its model.

Tensors carry the names of the model's `state_dict`; a factored layer's are `<layer>.U`, `.S`, `.V`.
The header's metadata, all text:

    format   "stiefel"
    version  "1"; a reader refuses what is newer than itself
    model    JSON of the `ModelSpec`; absent for a model made by hand
    layers   JSON {name: {kind, scheme, shape, rank, groups}} of the factored layers
    history  JSON list: what was done to the model, oldest first
    aliases  JSON {name: name}: tensors that are tied, stored once
    plan     JSON of the `RankPlan` that the model was converted by, if it knows

Reading runs no code but the model's factory; see `converter.factories` for which are run.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from converter.decompose import Factors
from converter.errors import StiefelError, did_you_mean
from converter.factors import Factored, factored_layers
from converter.files import atomic_path
from converter.header import FORMAT, Header, LayerRecord, sort_metadata
from converter.layers import Layer, closed, install, prepared
from converter.models import load, rebuild
from converter.specs import InputSpec, spec_of
from converter.state_dicts import versioned
from converter.weight_files import open_safetensors, read_safetensors, require_file

_WEIGHTS = (".safetensors", ".json", ".pt", ".pth", ".th", ".bin", ".ckpt")
_DENSE = {"FactoredLinear": nn.Linear, "FactoredConv1d": nn.Conv1d, "FactoredConv2d": nn.Conv2d}


def save_factored(
    model: nn.Module, path: str | Path, *, history: Mapping[str, Any] | None = None
) -> None:
    """Write a factored model (or a dense one) so that `load_factored` gives it back, exactly.

    Args:
        model: on any device, of any dtype; ties between parameters are kept.
        history: what was done to the model last; joins what the model's own file said.

    Raises:
        StiefelError: the file can't be written; nothing is left behind.
    """
    tensors, aliases = _tensors(model)
    header = Header(
        model=spec_of(model),
        layers={name: _record(layer) for name, layer in factored_layers(model).items()},
        history=[*getattr(model, "stiefel_history", ()), *([dict(history)] if history else [])],
        aliases=aliases,
        plan=getattr(model, "stiefel_plan", None),
    )
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, header.to_metadata())
        except SafetensorError as error:
            raise StiefelError(f"cannot write {path}: {' '.join(str(error).split())}") from error
        sort_metadata(temporary)


def save_dense(
    model: nn.Module, path: str | Path, *, history: Mapping[str, Any] | None = None
) -> None:
    """Write a dense model with its specification, so that `load_any` gives it back.

    Raises:
        StiefelError: the file can't be written, or the model has factored layers.
    """
    if layers := factored_layers(model):
        raise StiefelError(f"{next(iter(layers))} is factored; write the model with save_factored")
    save_factored(model, path, history=history)


def load_factored(path: str | Path, *, model: str | nn.Module | None = None) -> nn.Module:
    """The model that `save_factored` or `save_dense` wrote, on the CPU and in eval mode.

    Args:
        path: the checkpoint.
        model: the dense architecture, where the file doesn't say or isn't trusted to: a name as
            for `load`, or a module, which is copied.

    Returns:
        The model with `stiefel_spec`, `stiefel_history` and, if saved, `stiefel_plan`.

    Raises:
        StiefelError: not our file, a newer format, truncated, or it doesn't fit the architecture.
    """
    tensors, texts = read_safetensors(path)
    header = Header.from_metadata(path, texts)
    for alias, kept in header.aliases.items():
        if kept not in tensors:
            raise StiefelError(f"{path} is damaged: '{alias}' is tied to '{kept}', which is absent")
        tensors[alias] = tensors[kept]
    skeleton = _architecture(path, header, model)
    if header.layers or set(tensors) != set(skeleton.state_dict()):
        # As conversion does: parametrizations folded, attention opened.
        skeleton = prepared(skeleton, share=True)
        skeleton = closed(install(skeleton, _factored(path, skeleton, header.layers, tensors)))
    _fill(path, skeleton, tensors)
    for alias, kept in header.aliases.items():
        _tie(skeleton, alias, kept)
    skeleton.stiefel_history = list(header.history)
    if header.plan is not None:
        skeleton.stiefel_plan = header.plan
    return skeleton.eval()


def load_any(
    source: str | Path,
    *,
    model: str | None = None,
    args: Mapping[str, Any] | None = None,
    input: InputSpec | None = None,
    rename: Sequence[str] = (),
    variant: str | None = None,
    note: Callable[[str], None] | None = None,
) -> nn.Module:
    """A model from whatever names one: our checkpoint, another's with its model, or a model's name.

    Args:
        source: a file, or a name such as `zoo:resnet32`.
        model: the model's name, for a checkpoint that doesn't say; the rest is as for `load`.

    Raises:
        StiefelError: there is no such file or model, or they don't fit together.
    """
    path = Path(source)
    if path.is_dir():
        raise StiefelError(f"{path} is a folder; name a checkpoint file in it")
    if not path.is_file() and path.suffix not in _WEIGHTS and ":" in str(source):
        return load(str(source), args=args, input=input, note=note)
    if not (path.is_file() or Path(f"{path}.index.json").is_file()):
        require_file(path)
    if path.suffix == ".onnx":
        raise StiefelError(f"{path} is an ONNX file, which can be benchmarked but not loaded")
    if path.suffix == ".safetensors" and path.is_file():
        with open_safetensors(path) as file:
            kind = (file.metadata() or {}).get("format", "")
        if kind == FORMAT:
            return load_factored(path, model=model)
        if kind.startswith(FORMAT):
            raise StiefelError(f"{path} is an export ({kind}); work on the checkpoint it came from")
    if model is None:
        raise StiefelError(
            f"{path} doesn't say which model it is of; name the model as well "
            "(convert and export take --model)"
        )
    return load(
        model,
        checkpoint=path,
        args=args,
        input=input,
        rename=rename,
        variant=variant,
        note=note,
    )


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The header of our checkpoint, parsed: format, version, model, layers, history, aliases, plan.

    Raises:
        StiefelError: not our file, a newer format, or truncated.
    """
    with open_safetensors(path) as file:
        texts = file.metadata() or {}
    header = Header.from_metadata(path, texts)
    return {
        "format": FORMAT,
        "version": texts["version"],
        **header.model_dump(mode="json"),
    }


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to store, each tied tensor once, and {tied name: stored name}."""
    first: dict[int, str] = {}
    storages: set[int] = set()
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.is_meta:
            raise StiefelError(f"'{key}' can't be stored: it is no tensor with values")
        if (kept := first.setdefault(id(value), key)) != key:
            aliases[key] = kept
            continue
        stored = value.detach().contiguous()
        # Views of one storage that aren't tied would be refused.
        if stored.numel() and stored.untyped_storage().data_ptr() in storages:
            stored = stored.clone()
        storages.add(stored.untyped_storage().data_ptr())
        tensors[key] = stored
    return tensors, aliases


def _record(layer: Factored) -> LayerRecord:
    return LayerRecord(
        kind=type(layer).__name__,
        scheme=getattr(layer, "scheme", None),
        shape=tuple(layer.weight_shape),
        rank=layer.rank,
        groups=getattr(layer, "groups", 1),
    )


def _architecture(path: str | Path, header: Header, model: str | nn.Module | None) -> nn.Module:
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    if header.model is not None:
        return rebuild(header.model, trusted=model)
    if model is not None:
        return load(model)
    raise StiefelError(
        f"{path} doesn't say which model it is of (it was made by hand); give the architecture: "
        "load_factored(path, model=...)"
    )


def _factored(
    path: str | Path,
    skeleton: nn.Module,
    layers: Mapping[str, LayerRecord],
    tensors: Mapping[str, Tensor],
) -> dict[str, nn.Module]:
    """The factored layers with their tensors, by name, to take the places of the dense ones."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    new: dict[str, nn.Module] = {}
    for name, record in layers.items():
        dense = modules.get(name)
        if dense is None:
            near = did_you_mean(name, modules, count=1)
            raise StiefelError(f"{path} has a layer '{name}' that its model hasn't{near}")
        if not isinstance(dense, _DENSE.get(record.kind, ())):
            raise StiefelError(
                f"{path}: layer '{name}' is a {record.kind} there, a {type(dense).__name__} in the "
                "model"
            )
        if tuple(dense.weight.shape) != record.shape:
            raise StiefelError(
                f"{path}: layer '{name}' has weight {record.shape} there, "
                f"{tuple(dense.weight.shape)} in the model"
            )
        if absent := [part for part in "USV" if f"{name}.{part}" not in tensors]:
            raise StiefelError(f"{path} is damaged: '{name}.{absent[0]}' is absent")
        factors = Factors(*(tensors[f"{name}.{part}"] for part in "USV"))
        layer = Layer(name=name, kind=type(dense).__name__, module=dense)
        m, n = layer.shape(record.scheme)
        leading = (record.groups,) if record.groups > 1 else ()
        shapes = ((*leading, m, record.rank), (*leading, record.rank), (*leading, n, record.rank))
        for part, factor, shape in zip("USV", factors, shapes, strict=True):
            if tuple(factor.shape) != shape:
                raise StiefelError(
                    f"{path} is damaged: '{name}.{part}' is {tuple(factor.shape)}, not {shape}"
                )
        new[name] = layer.factored(factors, record.scheme)
        bias, built = tensors.get(f"{name}.bias"), new[name].bias
        trained = built is None or built.requires_grad
        new[name].bias = None if bias is None else nn.Parameter(bias, requires_grad=trained)
    return new


def _fill(path: str | Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the model the tensors themselves, so that it keeps the dtypes they were saved in."""
    own = model.state_dict()
    if strange := sorted(set(own) ^ set(tensors)):
        what = "lacks" if strange[0] in own else "has the unknown tensor"
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise StiefelError(f"{path} doesn't fit its model: it {what} {strange[0]}{more}")
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            raise StiefelError(
                f"{path} doesn't fit its model: {name} is {tuple(tensors[name].shape)} there, "
                f"{tuple(value.shape)} in the model"
            )
    dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()}
    if len(dtypes) == 1:  # buffers that aren't saved have to follow
        model.to(dtypes.pop())
    model.load_state_dict(versioned(model, tensors), assign=True)


def _tie(model: nn.Module, alias: str, kept: str) -> None:
    """Make the parameter or buffer `alias` the same object as `kept`."""
    (to, name), (source, other) = (_owner(model, key) for key in (alias, kept))
    for there, here in ((to._parameters, source._parameters), (to._buffers, source._buffers)):
        if name in there and other in here:
            there[name] = here[other]


def _owner(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), name
