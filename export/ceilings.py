"""What the device can do at best, measured: a large matrix product and a large copy."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import onnxruntime
import torch

from export.doctor import quiet_options

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ceiling:
    """The best of several tries on one device in one precision."""

    device: str
    precision: str
    gflops_per_s: float
    gbytes_per_s: float  # read and written


def ceiling(device: torch.device, precision: str, seconds: float = 0.5) -> Ceiling:
    """Measure the ceilings in about `seconds` (after one warm-up each).

    On CUDA the fp32 product may use TF32, as torch's convolutions and ONNX Runtime do by default.
    """
    dtype, cuda = DTYPES[precision], device.type == "cuda"
    # Large enough to fill the device, small enough to be done several times on two slow cores.
    side = 8192 if cuda else 1024 if precision == "fp32" else 512
    numbers = 2**28 if cuda else 2**24
    a = torch.randn(side, side, device=device).to(dtype)
    b, out = a.clone(), a.clone()
    source = torch.zeros(numbers, dtype=dtype, device=device)
    target = torch.empty_like(source)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        product = _best(lambda: torch.mm(a, b, out=out), device, seconds / 2)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    if not cuda and precision == "fp32":
        # Which library multiplies faster depends on the processor.
        product = min(product, _best(_onnx_product(side), device, seconds / 2))
    copy = _best(lambda: target.copy_(source), device, seconds / 2)
    return Ceiling(
        device=str(device),
        precision=precision,
        gflops_per_s=2e-9 * side**3 / product,
        gbytes_per_s=2e-9 * source.nbytes / copy,
    )


def _onnx_product(side: int) -> Callable[[], Any]:
    """A square matrix product in ONNX Runtime."""
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [side, side])
        for name in ("a", "b", "c")
    ]
    nodes = [onnx.helper.make_node("MatMul", ["a", "b"], ["c"])]
    graph = onnx.helper.make_graph(nodes, "product", values[:2], values[2:])
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    options = quiet_options()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    feed = {name: torch.randn(side, side).numpy() for name in "ab"}
    return lambda: session.run(None, feed)


def _best(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest call."""
    times: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
