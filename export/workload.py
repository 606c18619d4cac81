"""What one call must do at the least: multiply-adds, and bytes that products move.

Both are counted over convolutions, matrix products and attention. Bytes are those operations'
inputs, weights and outputs, each once: what passes through memory if nothing is fused or cached.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from converter.errors import StiefelError
from export import parity


@dataclass(frozen=True)
class Workload:
    """Of one call with one batch."""

    macs: int
    bytes: int

    def gflops_per_s(self, seconds: float) -> float:
        """Achieved 10⁹ floating-point operations per second, two per multiply-add."""
        return 2e-9 * self.macs / seconds

    def gbytes_per_s(self, seconds: float) -> float:
        """Achieved 10⁹ bytes per second."""
        return 1e-9 * self.bytes / seconds


def of_module(model: nn.Module, x: Tensor, itemsize: int) -> Workload:
    """Count a torch model on shapes alone; nothing is computed.

    Args:
        x: one batch, for its shape.
        itemsize: bytes per number in the precision that is timed.
    """
    shapes = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), _Counter() as counter:
        shapes(x.to("meta"))
    return Workload(counter.macs, counter.numbers * itemsize)


class _Counter(TorchDispatchMode):
    """Adds up what passes below autograd, where attention is already products."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = getattr(function, "overloadpacket", None)
        if packet in flop_registry:
            self.macs += flop_registry[packet](*args, **kwargs, out_val=result) // 2
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.numbers += sum(t.numel() for t in leaves if isinstance(t, Tensor))
        return result


def of_onnx(path: Path, batch_shape: tuple[int, ...]) -> Workload:
    """Count an ONNX file for one input shape, by ONNX's shape inference.

    Raises:
        StiefelError: the file can't be read or its shapes can't be inferred.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        for axis, size in zip(
            model.graph.input[0].type.tensor_type.shape.dim, batch_shape, strict=True
        ):
            axis.dim_value = size
        # The symbolic sizes inside came from the old input; infer them anew.
        del model.graph.value_info[:]
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as error:
        raise StiefelError(f"{path}: {parity.reason(error)}") from error
    shapes, itemsizes = {}, {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
        itemsizes[value.name] = _itemsize(tensor.elem_type)
    for weight in graph.initializer:
        shapes[weight.name] = tuple(weight.dims)
        itemsizes[weight.name] = _itemsize(weight.data_type)
    macs = moved = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            macs += _node_macs(node, shapes)
            names = [name for name in (*node.input, *node.output) if name]
            moved += sum(math.prod(shapes.get(n, ())) * itemsizes.get(n, 4) for n in names)
    return Workload(macs, moved)


def _node_macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    output, weight = shapes.get(node.output[0], ()), shapes.get(node.input[1], ())
    if not output or not weight:
        return 0
    if node.op_type == "Conv":
        return math.prod(output) * math.prod(weight[1:])
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return math.prod(output) * (weight[-1] if transposed else weight[-2])


def _itemsize(element: int) -> int:
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(element).itemsize
    except KeyError:
        return 4
