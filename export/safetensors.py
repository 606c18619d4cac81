"""The compact model as one .safetensors file that plain torch can load.

The tensors are those of the compact model's `state_dict`; the header's metadata says which modules
of the original architecture are replaced by what. Five lines rebuild it, without stiefel::

    model = torchvision.models.resnet18()
    layers = json.loads(safetensors.safe_open(path, "pt").metadata()["layers"])
    for name, (kind, options) in layers.items():
        model.set_submodule(name, getattr(torch.nn, kind)(**options))
    model.load_state_dict(safetensors.torch.load_file(path))

Two kinds are not torch's: `FactoredAttention` (`converter.attention`) and `PairedLinear`
(`export.compact`), for attention and for models that read a layer's weight; :func:`build` knows
them.
"""

import json
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn

from converter.attention import FactoredAttention
from converter.checkpoints import load_any
from converter.errors import StiefelError
from converter.files import atomic_path
from converter.layers import fold_parametrizations
from converter.models import rebuild
from converter.settings import Settings
from converter.specs import ModelSpec, spec_of
from converter.state_dicts import versioned
from export import parity
from export.compact import Compaction, PairedLinear, compaction
from export.result import ExportResult

FORMAT, VERSION = "stiefel-compact", "1"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CONVOLUTION = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
# Plain layers, and their arguments besides the bias.
_KINDS = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONVOLUTION),
    nn.Linear: "in_features out_features",
}


class SafetensorsSettings(Settings):
    """How a compact .safetensors file is written."""

    precision: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="number format of weights; bf16 in .safetensors alone"
    )


def export_safetensors(
    model: nn.Module,
    path: str | Path,
    *,
    settings: SafetensorsSettings | None = None,
    accuracy: float | None = None,
) -> ExportResult:
    """Write the compact form of a dense or factored model; read it back and compare every tensor.

    Where the model says how it is built (`stiefel_spec`), the file is also built into a model and
    its output compared with `model`'s on random input.

    Raises:
        StiefelError: the file can't be written, or doesn't read back as it was written.
    """
    settings = settings or SafetensorsSettings()
    reference = parity.reference_model(model)
    small = compaction(reference)
    spec = spec_of(model)
    state = _state(small.model, DTYPES[settings.precision])
    metadata = parity.describe(model, small, settings.precision, accuracy)
    metadata |= {"format": FORMAT, "version": VERSION, "layers": json.dumps(describe_layers(small))}
    if spec is not None:
        metadata["model"] = spec.model_dump_json()
    found = parity.Difference(0.0, 0.0)
    with atomic_path(path) as temporary:
        # Written by Python, so that a full disk is an OSError whose partial file goes away.
        temporary.write_bytes(safetensors.torch.save(state, metadata))
        _check(temporary, state)
        if spec is not None:
            x = parity.random_input(torch.zeros(1, *spec.input.shape), 2, seed=0)
            again = _rebuilt(rebuild(spec), metadata["layers"], state, path).float()
            found = _compare(reference, again, x, settings.precision)
        size = temporary.stat().st_size
    return ExportResult(
        path=Path(path),
        format="safetensors",
        precision=settings.precision,
        file_size_bytes=size,
        max_abs_error=found.absolute,
        max_rel_error=found.relative,
        outputs_compared=found.count or sum(tensor.numel() for tensor in state.values()),
        compared="outputs" if found.count else "tensors",
        ranks=small.ranks,
        merged=small.merged,
        folded=small.folded,
    )


def build(path: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Build the compact model that a file of :func:`export_safetensors` holds, in eval mode.

    Args:
        model: the architecture, where the file doesn't say which it is; changed in place.

    Raises:
        StiefelError: the file is no compact model, or doesn't fit the architecture.
    """
    metadata = read_metadata(path)
    spec = ModelSpec.model_validate_json(metadata["model"]) if "model" in metadata else None
    if model is None and spec is None:
        raise StiefelError(
            f"{path} doesn't say which model it is; pass the architecture to build()"
        )
    model = rebuild(spec) if model is None else model
    model = _rebuilt(model, metadata["layers"], safetensors.torch.load_file(path), path)
    if spec is not None:
        model.stiefel_spec = spec
    return model.requires_grad_(False)


def _rebuilt(
    model: nn.Module, layers: str, state: dict[str, Tensor], source: str | Path
) -> nn.Module:
    """The architecture with the file's layers and tensors, in place.

    Raises:
        StiefelError: they don't fit.
    """
    try:
        for name, (kind, options) in json.loads(layers).items():
            model.set_submodule(name, _make(kind, options))
        fold_parametrizations(model)
        model.to(next(t.dtype for t in state.values() if t.is_floating_point()))
        model.load_state_dict(versioned(model, state))
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise StiefelError(f"{source} doesn't fit {type(model).__name__}: {text}") from error
    return model.eval()


def open_model(source: str | Path) -> nn.Module:
    """A model from a compact export, or from whatever else names one (`load_any`).

    Raises:
        StiefelError: there is no such file or model, or they don't fit together.
    """
    path = Path(source)
    return build(path) if path.is_file() and is_compact(path) else load_any(source)


def is_compact(path: str | Path) -> bool:
    """Whether the file was written by :func:`export_safetensors`."""
    try:
        return read_metadata(path).get("format") == FORMAT
    except StiefelError:
        return False


def read_metadata(path: str | Path) -> dict[str, str]:
    """The header's metadata.

    Raises:
        StiefelError: no such file, no safetensors file, or not a compact model.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise StiefelError(f"cannot read {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise StiefelError(
            f"{path} is not a compact export; its format is {metadata.get('format')}"
        )
    return metadata


def describe_layers(small: Compaction) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name to (class, arguments) of each module that differs from the original architecture."""
    layers: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in small.replaced:
        for inner, module in small.model.get_submodule(name).named_modules(prefix=name):
            layers[inner] = _kind(module)
    return layers


def _kind(module: nn.Module) -> tuple[str, dict[str, Any]]:
    if isinstance(module, FactoredAttention):
        keys = ("embed_dim", "num_heads", "dropout", "batch_first")
        return "FactoredAttention", {key: getattr(module, key) for key in keys}
    # By the class that computes it: an attention's output is of a subclass of torch's own.
    for kind, keys in _KINDS.items():
        if isinstance(module, kind):
            options = {key: getattr(module, key) for key in keys.split()}
            return kind.__name__, options | {"bias": module.bias is not None}
    return type(module).__name__, {}


def _make(kind: str, options: dict[str, Any]) -> nn.Module:
    if kind == "FactoredAttention":
        # The projections follow as entries of their own.
        width = options.pop("embed_dim")
        return FactoredAttention(nn.Identity(), nn.Linear(width, width), **options)
    if kind == "PairedLinear":
        return PairedLinear()
    if kind not in ("Conv1d", "Conv2d", "Conv3d", "Linear", "Sequential", "Identity"):
        raise ValueError(f"unknown kind of layer '{kind}'")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return getattr(nn, kind)(**options)


def _state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict in the file's precision; shared tensors as copies, so that all names load."""
    return {
        name: (t.to(dtype) if t.is_floating_point() else t).detach().cpu().clone().contiguous()
        for name, t in model.state_dict().items()
    }


def _check(path: Path, state: dict[str, Tensor]) -> None:
    again = safetensors.torch.load_file(path)
    wrong = [n for n in state if n not in again or not torch.equal(again[n], state[n])]
    # A tensor with not-a-numbers never equals itself, and is no model to publish either.
    if wrong or len(again) != len(state):
        raise StiefelError(f"the file does not read back as written: first at tensor {wrong[:1]}")


def _compare(
    reference: nn.Module, again: nn.Module, x: Tensor, precision: str
) -> parity.Difference:
    worst = parity.Difference(0.0, 0.0)
    pairs = zip(
        parity.reference_outputs(reference, x), parity.reference_outputs(again, x), strict=True
    )
    for one, other in pairs:
        worst |= parity.difference(one, other)
    if worst.relative > parity.TOLERANCES[precision]:
        raise StiefelError(
            f"the compact model's output differs from the original's by {worst.relative:.1e} of "
            f"its magnitude (allowed: {parity.TOLERANCES[precision]:.0e})"
        )
    return worst
