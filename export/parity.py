"""Proof that an ONNX file computes what the torch model does, and the place where it doesn't."""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn

from converter.errors import StiefelError
from converter.specs import spec_of
from export.compact import Compaction
from export.doctor import stiefel_version

# An output that varies less than this between inputs, relative to its size, proves little.
VACUOUS = 1e-3
# Largest difference allowed, relative to the reference's largest magnitude.
TOLERANCES = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 1e-1}
_UNKNOWN_OPERATOR = re.compile(
    r"No Op registered for (\S+) with|(\S+)\(-?\d+\) is not a registered function"
)


@dataclass(frozen=True)
class Difference:
    """The largest difference between two tensors, in their unit and relative to the reference."""

    absolute: float
    relative: float  # by the reference's largest magnitude; inf where not finite
    count: int = 0  # numbers compared

    def __or__(self, other: "Difference") -> "Difference":
        return Difference(
            max(self.absolute, other.absolute),
            max(self.relative, other.relative),
            self.count + other.count,
        )


def difference(reference: np.ndarray, found: np.ndarray) -> Difference:
    """Compare two arrays in float64; another shape or not-a-number is infinitely far."""
    if reference.shape != found.shape:
        return Difference(np.inf, np.inf, found.size)
    if not reference.size:
        return Difference(0.0, 0.0)
    reference, found = reference.astype(np.float64), found.astype(np.float64)
    absolute = float(np.max(np.abs(reference - found)))
    if not np.isfinite(absolute):
        return Difference(np.inf, np.inf, found.size)
    scale = float(np.max(np.abs(reference)))
    relative = absolute / scale if scale else (np.inf if absolute else 0.0)
    return Difference(absolute, relative, found.size)


def reference_model(model: nn.Module) -> nn.Module:
    """A copy as float32 on the CPU, in eval mode: what an export must agree with."""
    return copy.deepcopy(model).cpu().float().eval()


def random_input(example: Tensor, batch: int, seed: int, size: Sequence[int] = ()) -> Tensor:
    """Normal numbers shaped as the example, with another batch (and last axes `size`)."""
    shape = [batch, *example.shape[1:]]
    if size:
        shape[-len(size) :] = size
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def describe(
    model: nn.Module, small: Compaction, precision: str, accuracy: float | None
) -> dict[str, str]:
    """Metadata of an exported file: versions, source, ranks, and the accuracy (0..1) if known."""
    spec = spec_of(model)
    facts = {
        "stiefel_version": stiefel_version(),
        "source": spec.model_dump_json() if spec else type(model).__name__,
        "ranks": json.dumps(small.ranks),
        "merged": json.dumps(small.merged),
        "precision": precision,
    }
    return facts if accuracy is None else facts | {"accuracy": repr(float(accuracy))}


def session(path: Path | bytes, *, optimise: bool = True) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU that keeps quiet.

    Raises:
        StiefelError: the file isn't ONNX, is cut short, or needs an operator that isn't there.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    name = str(path) if isinstance(path, Path) else "the exported model"
    if isinstance(path, Path) and not path.is_file():
        raise StiefelError(f"{name}: no such file")
    try:
        source = path if isinstance(path, bytes) else str(path)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise StiefelError(f"{name}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """ONNX Runtime's message in one line, without its codes and source positions."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    text = re.sub(r"/\S+\.(cc|h):\d+ |^Load model from .*? failed: ?", "", text)
    unread = ("Protobuf parsing failed", "INVALID_PROTOBUF", "No graph was found")
    if any(sign in str(error) for sign in unread):
        return "not an ONNX file, or cut short; export it again"
    if found := _UNKNOWN_OPERATOR.search(text):
        return f"it needs the operator {found[1] or found[2]}, which this ONNX Runtime doesn't have"
    if "external data" in text.lower() or "external initializer" in text.lower():
        return "its weights (.onnx.data) are missing or cut short; keep the two files together"
    return " ".join(text.split())[:300] or type(error).__name__


@torch.no_grad()
def reference_outputs(model: nn.Module, x: Tensor) -> list[np.ndarray]:
    """The model's tensors for one input, in float32 or wider, as ONNX numbers its outputs."""
    leaves = torch.utils._pytree.tree_leaves(model(x))
    return [leaf.detach().cpu().numpy() for leaf in leaves if isinstance(leaf, Tensor)]


def run(runtime: onnxruntime.InferenceSession, x: Tensor) -> list[np.ndarray]:
    """The session's outputs for one input tensor, cast to what the session expects."""
    wanted = runtime.get_inputs()[0]
    array = x.detach().cpu().numpy()
    if wanted.type == "tensor(float16)":
        array = array.astype(np.float16)
    return runtime.run(None, {wanted.name: array})


def outputs_differ(model: nn.Module, path: Path, inputs: Sequence[Tensor]) -> Difference:
    """The largest difference between torch and ONNX Runtime over all outputs and inputs."""
    runtime, worst = session(path), Difference(0.0, 0.0)
    for x in inputs:
        try:
            found = run(runtime, x)
        except Exception as error:
            raise StiefelError(
                f"ONNX Runtime fails on an input {tuple(x.shape)}: {reason(error)}"
            ) from error
        for one, other in zip(reference_outputs(model, x), found, strict=True):
            worst |= difference(one, other)
    return worst


def is_vacuous(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether the outputs hardly depend on the input (a last layer that starts at zero)."""
    rows = [reference_outputs(model, x)[0].astype(np.float64) for x in inputs]
    rows = np.concatenate([r.reshape(len(r), -1) for r in rows])
    spread = np.abs(rows - rows.mean(axis=0)).max()
    return bool(spread <= VACUOUS * np.abs(rows).max())


@dataclass(frozen=True)
class LayerDifference:
    """How one value inside the network differs between torch and ONNX Runtime."""

    layer: str
    value: str
    difference: Difference


def layers_differ(program: Any, path: Path, x: Tensor) -> Iterator[LayerDifference]:
    """Compare every value that the exported graph and the ONNX file both name, in graph order.

    Args:
        program: what torch.onnx.export returned; its exported program is interpreted in torch.
        path: the file; run without further optimisation, so that its values exist.
        x: one input (N, ...).
    """
    exported = program.exported_program
    inner = _Recorder(exported.graph_module)
    inner.run(*_lifted_inputs(exported, x))
    model = onnx.load(str(path))
    # The file's outputs have names of their own.
    outputs = exported.graph_signature.user_outputs
    renamed = dict(zip(outputs, (o.name for o in model.graph.output), strict=True))
    present = {name for node in model.graph.node for name in node.output}
    names = {name: renamed.get(name, name) for name in inner.values}
    names = {name: there for name, there in names.items() if there in present}
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=there) for there in names.values())
    found = run(session(_serialised(model), optimise=False), x)
    for name, array in zip(names, found, strict=True):
        node, tensor = inner.values[name]
        yield LayerDifference(_layer(node), name, difference(tensor.numpy(), array))


class _Recorder(fx.Interpreter):
    """Keeps every floating-point tensor that a graph computes."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.values: dict[str, tuple[fx.Node, Tensor]] = {}

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor) and result.is_floating_point():
            self.values[n.name] = (n, result.detach().clone())
        return result


def _lifted_inputs(exported: Any, x: Tensor) -> list[Any]:
    """What the exported graph takes: parameters, buffers, constants, then the user's input."""
    stored = {**exported.state_dict, **exported.constants}
    dtype = next((t.dtype for t in stored.values() if t.is_floating_point()), x.dtype)
    specs = exported.graph_signature.input_specs
    return [x.to(dtype) if spec.target is None else stored[spec.target] for spec in specs]


def _layer(node: fx.Node) -> str:
    """The innermost module that the value was computed in, and the operation."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values()))), "")
    return f"{path or 'the model itself'} ({getattr(node.target, '__name__', node.target)})"


def _serialised(model: onnx.ModelProto) -> bytes:
    try:
        return model.SerializeToString()
    except Exception as error:  # more than protobuf's 2 GiB
        raise StiefelError("the model is too large to compare layer by layer") from error
