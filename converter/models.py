"""Models by name: `torchvision:`, `timm:`, `zoo:`, `FILE.py:factory`, `package.module:factory`."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from converter.cost import dtype_of
from converter.errors import StiefelError, did_you_mean
from converter.factories import (
    absolute_name,
    call_factory,
    import_factory,
    refuse_unless_factory,
)
from converter.layers import refuse_scripted
from converter.specs import InputChange, InputSpec, ModelSpec, checked_args, parse_shape, spec_of
from converter.state_dicts import load_state, read_state
from converter.zoo import ZOO, default_input

__all__ = ["InputSpec", "ModelSpec", "load", "parse_args", "parse_shape", "rebuild", "spec_of"]

# Builders whose auxiliary classifiers only serve backpropagation; local training has no use for
# them, and without them the model returns plain logits in training too.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def load(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    weights: str | None = None,
    args: Mapping[str, Any] | None = None,
    input: InputSpec | InputChange | None = None,
    rename: Sequence[str] = (),
    variant: str | None = None,
    note: Callable[[str], None] | None = None,
) -> nn.Module:
    """Build a dense model and load its weights; it comes in eval mode.

    Args:
        name: `torchvision:resnet18`, `timm:vit_tiny_patch16_224`, `zoo:resnet32`,
            `nets.py:make` or `package.module:Net`.
        checkpoint: a .safetensors file (or the index of a sharded one), .pt or .pth.
        weights: torchvision's or timm's own weights, such as "DEFAULT"; needs a network.
        args: keyword arguments of the factory; plain data only, for a checkpoint repeats them.
        input: what the model expects of images, if not what the source says: all of it, or what
            differs.
        rename: 'REGEX=REPLACEMENT' rules for the checkpoint's keys.
        variant: which weights to take where a checkpoint holds several, such as "ema".
        note: called with each remark about the checkpoint (what was ignored); a warning if None.

    Returns:
        The model, its specification in `model.stiefel_spec` (see `spec_of`).

    Raises:
        StiefelError: unknown model or argument, TorchScript, unreadable checkpoint, keys that don't
            fit.
    """
    note = note or _warn
    if checkpoint is not None and weights is not None:
        raise StiefelError("give a checkpoint or weights, not both")
    model, expected, used = _build(name, checked_args(args or {}), weights, note)
    refuse_scripted(model)
    if checkpoint is not None:
        if "transform_input" in used and "transform_input" not in (args or {}):
            note(f"{name}: torchvision's own weights want the model argument transform_input=true")
        load_state(
            model,
            read_state(checkpoint, variant=variant, note=note),
            rename=rename,
            ignore=_AUXILIARY.get(name.removeprefix("torchvision:"), ()),
            source=checkpoint,
            note=note,
        )
    if expected is None and (input is None or input.shape is None):
        note(f"{name}: taking ImageNet's input, 3x224x224; give an input to say otherwise")
    expected = expected or InputSpec()
    if input is not None:
        expected = input.of(expected) if isinstance(input, InputChange) else input
    num_classes = _count_classes(name, model.eval(), expected)
    model.stiefel_spec = ModelSpec(
        name=absolute_name(name), args=used, input=expected, num_classes=num_classes
    )
    return model


def rebuild(spec: ModelSpec, *, trusted: str | None = None) -> nn.Module:
    """The model that a checkpoint's specification names, in eval mode, its weights meaningless.

    Leaves torch's random state alone.

    Args:
        spec: what the checkpoint says.
        trusted: the model's name as the user gave it; replaces the checkpoint's.

    Raises:
        StiefelError: the specification names no model, or code that isn't evidently one.
    """
    name = trusted or spec.name
    if trusted is None and name.partition(":")[0] not in _SOURCES:
        refuse_unless_factory(name, import_factory(name))
    with torch.random.fork_rng(devices=[]):
        model, _, _ = _build(name, dict(spec.args), None, _warn)
    model.stiefel_spec = spec.model_copy(update={"name": absolute_name(name)})
    return model.eval()


def parse_args(pairs: Iterable[str]) -> dict[str, Any]:
    """Read 'key=value' pairs, values as YAML: 'width=0.5' is {'width': 0.5}.

    Raises:
        StiefelError: a pair has no '=' or its value is no YAML.
    """
    args = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise StiefelError(f"model argument '{pair}' must be written key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise StiefelError(f"model argument '{pair}': the value can't be read") from error
        if isinstance(value, str):  # YAML 1.1 takes 1e-3 for text
            with suppress(ValueError):
                value = float(value)
        args[key.strip()] = value
    return args


_Built = tuple[nn.Module, InputSpec | None, dict[str, Any]]


def _build(
    name: str, args: dict[str, Any], weights: str | None, note: Callable[[str], None]
) -> _Built:
    """The model, its input where the source knows it, and the arguments that rebuild it."""
    source, colon, rest = name.partition(":")
    if colon and source in _SOURCES:
        return _SOURCES[source](rest, args, weights, note)
    if not colon:
        options = [*(f"zoo:{key}" for key in ZOO), *(f"torchvision:{key}" for key in _builders())]
        named = [option for option in options if option.partition(":")[2] == name.lower()]
        near = f"; did you mean {', '.join(named)}?" if named else ""
        raise StiefelError(
            f"model '{name}' has no source: write torchvision:NAME, timm:NAME, zoo:NAME, "
            f"FILE.py:factory or package.module:factory{near}"
        )
    if weights is not None:
        raise StiefelError(f"{name} has no weights of its own; give a checkpoint")
    if "." not in source and "/" not in source and (near := did_you_mean(source, _SOURCES)):
        raise StiefelError(f"unknown model source '{source}' in '{name}'{near}")
    model = call_factory(name, import_factory(name), args)
    if not isinstance(model, nn.Module):
        raise StiefelError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module")
    return model, None, args


def _zoo(
    key: str, args: dict[str, Any], weights: str | None, note: Callable[[str], None]
) -> _Built:
    if key not in ZOO:
        near = did_you_mean(key, ZOO) or f"; there are {', '.join(ZOO)}"
        raise StiefelError(f"unknown model 'zoo:{key}'{near}")
    if weights is not None:
        raise StiefelError(f"zoo:{key} has no weights of its own; give a checkpoint")
    return call_factory(f"zoo:{key}", ZOO[key], args), default_input(key, args), args


def _builders() -> list[str]:
    import torchvision  # here, because it takes a second

    return torchvision.models.list_models(module=torchvision.models)


def _torchvision(
    key: str, args: dict[str, Any], weights: str | None, note: Callable[[str], None]
) -> _Built:
    from torchvision.models import get_model_builder, get_model_weights

    builders = _builders()
    if key not in builders:
        raise StiefelError(f"unknown model 'torchvision:{key}'{did_you_mean(key, builders)}")
    available = get_model_weights(key)
    chosen = available.DEFAULT if weights is None else _torchvision_weights(key, weights)
    used = {"aux_logits": False, **args} if key in _AUXILIARY else dict(args)
    extra = {"weights": None if weights is None else chosen}
    if weights is None and key in _AUXILIARY:
        extra["init_weights"] = False  # slow, and only for training from scratch
    model = call_factory(f"torchvision:{key}", get_model_builder(key), {**extra, **used})
    if key in _AUXILIARY:
        used["transform_input"] = model.transform_input  # its own weights switch it on
    preset = chosen.transforms()
    side = int(args.get("image_size", preset.crop_size[0]))
    expected = InputSpec(
        shape=(3, side, side),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        resize=max(side, preset.resize_size[0]) if "image_size" not in args else side,
        interpolation=preset.interpolation.value,
    )
    return model, expected, used


def _torchvision_weights(key: str, weights: str) -> Any:
    from torchvision.models import get_model_weights

    available = get_model_weights(key)
    names = ["DEFAULT", *(member.name for member in available)]
    if weights not in names:
        raise StiefelError(f"torchvision:{key} has no weights '{weights}'; it has {names}")
    return available[weights]


def _timm(
    key: str, args: dict[str, Any], weights: str | None, note: Callable[[str], None]
) -> _Built:
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError as error:
        raise StiefelError(f"timm:{key} needs timm; pip install 'stiefel[timm]'") from error
    if "/" not in key and not timm.is_model(key.partition(".")[0]):
        raise StiefelError(f"unknown model 'timm:{key}'{did_you_mean(key, timm.list_models())}")
    extra = {"model_name": key, "pretrained": weights is not None}
    if weights is not None and weights != "DEFAULT":
        extra["model_name"] = f"{key.partition('.')[0]}.{weights}"
    model = call_factory(f"timm:{key}", timm.create_model, {**extra, **args})
    data = resolve_model_data_config(model)
    shape = tuple(data["input_size"])
    if "img_size" in args:
        size = args["img_size"]
        shape = (shape[0], *((size, size) if isinstance(size, int) else tuple(size)))
    mean, std = tuple(data["mean"]), tuple(data["std"])
    channels = int(args.get("in_chans", shape[0]))
    if channels != shape[0]:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    expected = InputSpec(
        shape=(channels, *shape[1:]),
        mean=mean,
        std=std,
        resize=round(min(shape[1:]) / data["crop_pct"]),
        interpolation=data["interpolation"],
    )
    return model, expected, args


_SOURCES: dict[str, Callable[..., _Built]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "zoo": _zoo,
}


def _count_classes(name: str, model: nn.Module, expected: InputSpec) -> int:
    """Length of the logits, by running the model on one empty image of the expected shape."""
    example = torch.zeros(1, *expected.shape, dtype=dtype_of(model))
    try:
        output = _shape_only(model, example)
    except Exception:  # not every model runs on meta tensors
        try:
            with torch.no_grad():
                output = model(example)
        except Exception as error:
            shape = "x".join(map(str, expected.shape))
            text = " ".join(str(error).split())
            raise StiefelError(
                f"{name} doesn't run on input {shape} ({text[:200]}); give the right input shape"
            ) from error
    if not isinstance(output, Tensor) or output.dim() != 2:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise StiefelError(f"{name} is no classifier: it returns {what}, not logits (N, classes)")
    return output.shape[1]


def _shape_only(model: nn.Module, example: Tensor) -> Any:
    """The model's output on the meta device: its shape at no cost."""
    meta: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    meta |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    # A copy whose tensors are these (not functional_call, which spoils a module used twice).
    hollow = copy.deepcopy(model, meta)
    with torch.no_grad():
        return hollow(example.to("meta"))


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
