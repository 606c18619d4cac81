"""Torch to ONNX: one exporter for dense and factored models, and no file without proof."""

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir
import torch
from pydantic import Field
from torch import Tensor, nn

from converter.errors import StiefelError, first_line
from converter.settings import Settings
from converter.specs import spec_of
from export import parity
from export.compact import Compaction, compaction, reads_size
from export.naming import tidy
from export.result import ExportResult
from export.staging import companion, staged

Progress = Callable[[str, int, int], None]

# Protobuf holds 2 GiB in all; the graph itself needs some room.
EXTERNAL_DATA_ABOVE = 2**31 - 2**24
# From here on ONNX has attention as one operator.
ATTENTION_OPSET = 23
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class OnnxSettings(Settings):
    """How an ONNX file is written."""

    precision: Literal["fp32", "fp16"] = Field(
        "fp32", description="number format of weights, inputs and outputs"
    )
    opset: int = Field(20, ge=18, le=25, description="version of ONNX's operators to write")
    image_size: Literal["auto", "fixed"] = Field(
        "auto",
        description="auto: any height and width where the graph needs no arithmetic for it; "
        "fixed: the example's",
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="largest difference from torch, relative to the output's magnitude "
        "(default: 1e-4 in fp32, 0.03 in fp16)",
    )


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example: Tensor | None = None,
    settings: OnnxSettings | None = None,
    inputs: Tensor | None = None,
    accuracy: float | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write the compact form of a dense or factored model, and prove that the file computes it.

    The file is loaded in ONNX Runtime and compared with `model` on random inputs at two batch sizes
    (and at a second image size, if any fits), and on `inputs`. It appears only if all agree.

    Args:
        example: one input (N, ...) float32, for its shape; from the model's spec when None.
        inputs: real inputs (N, ...) to compare on, besides the random ones.
        accuracy: 0..1, recorded in the file's metadata.

    Raises:
        StiefelError: the model can't be exported, differs from torch (the first differing layer is
            named), or the file can't be written. No file is left then.
    """
    settings = settings or OnnxSettings()
    tell = progress or (lambda what, done, total: None)
    reference = parity.reference_model(model)
    example = example_of(model, example)
    tell("compact", 0, 3)
    small = compaction(reference)
    with staged(path) as temporary:
        try:
            result = _attempt(
                reference, small, temporary, example, settings, inputs, accuracy, tell
            )
        except _FixedSizeError:
            fixed = settings.model_copy(update={"image_size": "fixed"})
            result = _attempt(reference, small, temporary, example, fixed, inputs, accuracy, tell)
    tell("done", 3, 3)
    return result.model_copy(update={"path": Path(path)})


def example_of(model: nn.Module, example: Tensor | None) -> Tensor:
    """The example as float32 on the CPU, or zeros (1, C, H, W) of the shape the spec names.

    Raises:
        StiefelError: there is neither, or the example isn't a batch.
    """
    if example is None:
        spec = spec_of(model)
        if spec is None:
            raise StiefelError("give an example input: this model doesn't say what it takes")
        return torch.zeros(1, *spec.input.shape)
    if example.ndim < 2:
        raise StiefelError(f"the example must be a batch (N, ...), not {tuple(example.shape)}")
    return example.detach().cpu().float()


class _FixedSizeError(Exception):
    """The file written with free image size works at one size only."""


def _attempt(
    reference: nn.Module,
    small: Compaction,
    path: Path,
    example: Tensor,
    settings: OnnxSettings,
    inputs: Tensor | None,
    accuracy: float | None,
    tell: Progress,
) -> ExportResult:
    tell("export", 1, 3)
    program, axes = _to_onnx(small.model, example, settings)
    tidy(program.model, small.model, axes)
    _describe(program.model, reference, small, settings, accuracy)
    _save(program.model, path)
    tell("compare with torch", 2, 3)
    _check(path)
    tolerance = settings.tolerance or parity.TOLERANCES[settings.precision]
    trials = [parity.random_input(example, 1, seed=0), parity.random_input(example, 3, seed=1)]
    if inputs is not None:
        trials.append(inputs.detach().cpu().float())
    found = _compare(reference, program, path, trials, tolerance)
    if "height" in axes.values():
        _compare_other_size(reference, path, example, tolerance)
    return ExportResult(
        path=path,
        format="onnx",
        precision=settings.precision,
        file_size_bytes=size_on_disk(path),
        max_abs_error=found.absolute,
        max_rel_error=found.relative,
        outputs_compared=found.count,
        compared="layers" if parity.is_vacuous(reference, trials) else "outputs",
        dynamic=tuple(axes.values()),
        ranks=small.ranks,
        merged=small.merged,
        folded=small.folded,
        opset=settings.opset,
    )


def size_on_disk(path: Path) -> int:
    """Bytes of an ONNX file and its external data."""
    return sum(p.stat().st_size for p in (path, companion(path)) if p.exists())


def _to_onnx(
    model: nn.Module, example: Tensor, settings: OnnxSettings
) -> tuple[Any, dict[int, str]]:
    """The ONNX program and its dynamic axes {axis: name}."""
    dtype = torch.float16 if settings.precision == "fp16" else torch.float32
    model = copy.deepcopy(model).to(dtype)
    # A batch of one would be taken for a constant.
    x = example[:1].expand(2, *example.shape[1:]).to(dtype).contiguous()
    with _quiet():
        exported, axes = _captured(model, x, settings)
        try:
            if settings.opset < ATTENTION_OPSET and _attends(exported):
                exported = exported.run_decompositions({_ATTENTION: _plain_attention})
            program = torch.onnx.export(
                exported,
                (x,),
                dynamo=True,
                input_names=["input"],
                output_names=_output_names(exported),
                opset_version=settings.opset,
                verbose=False,
            )
        except Exception as error:
            raise _cannot(model, error) from error
    written = program.model.opset_imports.get("")
    if written != settings.opset:
        raise StiefelError(
            f"cannot write opset {settings.opset}: this model comes out as opset {written}; "
            f"ask for {written}"
        )
    return program, axes


def _attends(exported: Any) -> bool:
    return any(node.target is _ATTENTION for node in exported.graph.nodes)


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as products and a softmax, its scale a constant.

    The exporter's own form computes the scale and the key's shape at run time: some ten operators
    to a layer that a fixed head size doesn't need.
    """
    if enable_gqa:
        key, value = (
            t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value)
        )
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1) @ value


def _output_names(exported: Any) -> list[str]:
    count = len(exported.graph_signature.user_outputs)
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _captured(model: nn.Module, x: Tensor, settings: OnnxSettings) -> tuple[Any, dict[int, str]]:
    batch = torch.export.Dim("batch")
    if settings.image_size == "auto" and x.ndim == 4 and not reads_size(model):
        free = torch.export.Dim.AUTO
        with contextlib.suppress(Exception):
            exported = torch.export.export(
                model, (x,), dynamic_shapes=({0: batch, 2: free, 3: free},), strict=False
            )
            if _sizes_cost_nothing(exported):
                return exported, {0: "batch", 2: "height", 3: "width"}
    try:
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:
        raise _cannot(model, error) from error
    return exported, {0: "batch"}


def _sizes_cost_nothing(exported: Any) -> bool:
    """Whether height and width are free and nothing is computed from them at run time."""
    for node in exported.graph.nodes:
        if node.op == "call_function" and "sym_size" in str(node.target) and node.args[1] != 0:
            return False
        if "adaptive" in str(node.target) and set(node.args[1]) != {1}:
            return False
        if node.op == "placeholder" and not node.name.startswith(("p_", "b_", "c_")):
            shape = node.meta["val"].shape
            if any(isinstance(size, int) for size in shape[2:]):
                return False
    return True


def _cannot(model: nn.Module, error: Exception) -> StiefelError:
    """One line from the exporter's many."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = re.sub(r"\x1b\[[0-9;]*m", "", lines[0] if lines else type(cause).__name__)
    hint = " (the forward pass must be free of data-dependent Python control flow)"
    if unknown := re.search(r"translating node .*target=([\w.]+)", text):
        text, hint = f"there is no translation of {unknown[1]}", ""
    return StiefelError(f"cannot export {type(model).__name__} to ONNX: {text[:300]}{hint}")


@contextlib.contextmanager
def _quiet():
    """Keep the exporter's chatter off the terminal; what matters comes as an error."""
    level = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


def _describe(
    graph_model: Any,
    model: nn.Module,
    small: Compaction,
    settings: OnnxSettings,
    accuracy: float | None,
) -> None:
    properties = parity.describe(model, small, settings.precision, accuracy)
    graph_model.producer_name = "stiefel"
    graph_model.producer_version = properties["stiefel_version"]
    graph_model.graph.name = type(model).__name__
    graph_model.metadata_props.update(properties)


def _save(graph_model: Any, path: Path) -> None:
    weights = graph_model.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    outside = companion(path).name if size > EXTERNAL_DATA_ABOVE else None
    onnx_ir.save(graph_model, path, external_data=outside)


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        first = first_line(error)
        raise StiefelError(f"the exported graph is not valid ONNX: {first[:300]}") from error


def _compare(
    reference: nn.Module, program: Any, path: Path, trials: list[Tensor], tolerance: float
) -> parity.Difference:
    """The difference found, within tolerance.

    Raises:
        StiefelError: it isn't; names the first layer that differs.
    """
    found = parity.outputs_differ(reference, path, trials)
    if found.relative > tolerance:
        raise StiefelError(
            f"ONNX Runtime's output differs from torch's by {found.relative:.1e} of its magnitude "
            f"(allowed: {tolerance:.0e}); {_first_difference(program, path, trials[-1], tolerance)}"
        )
    if parity.is_vacuous(reference, trials):
        for inner in parity.layers_differ(program, path, trials[-1]):
            if inner.difference.relative > tolerance:
                raise StiefelError(
                    f"ONNX Runtime differs from torch by {inner.difference.relative:.1e} at layer "
                    f"{inner.layer} (allowed: {tolerance:.0e})"
                )
            found |= inner.difference
    return found


def _first_difference(program: Any, path: Path, x: Tensor, tolerance: float) -> str:
    for inner in parity.layers_differ(program, path, x):
        if inner.difference.relative > tolerance:
            return f"the first layer that differs is {inner.layer}"
    if next(program.exported_program.parameters()).dtype == torch.float16:
        return "every layer does what torch does in fp16, which is too coarse for this model"
    return (
        "every layer of the captured graph agrees, so the capture itself lost something: "
        "look for random numbers or Python state in the forward pass"
    )


def _compare_other_size(
    reference: nn.Module, path: Path, example: Tensor, tolerance: float
) -> None:
    """Prove that another, oblong image size works too.

    Raises:
        _FixedSizeError: it doesn't, in torch or in the file.
    """
    height, width = example.shape[-2:]
    size = (height + min(height, 32), width + 2 * min(width, 32))
    other = parity.random_input(example, 1, seed=2, size=size)
    try:
        found = parity.outputs_differ(reference, path, [other])
    except Exception as error:
        raise _FixedSizeError from error
    if found.relative > tolerance:
        raise _FixedSizeError
