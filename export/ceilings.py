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
    On the CPU the product is the best of torch's and ONNX Runtime's, which differ from processor to
    processor, and no less than in fp32, in which ONNX Runtime computes fp16 there.
    """
    dtype, cuda = DTYPES[precision], device.type == "cuda"
    numbers = 2**28 if cuda else 2**24
    source = torch.zeros(numbers, dtype=dtype, device=device)
    target = torch.empty_like(source)
    products = _products(device, dtype)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        flops = max(
            2 * side**3 / _best(call, device, seconds / 2 / len(products))
            for side, call in products
        )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    copy = _best(lambda: target.copy_(source), device, seconds / 2)
    return Ceiling(
        device=str(device),
        precision=precision,
        gflops_per_s=1e-9 * flops,
        gbytes_per_s=2e-9 * source.nbytes / copy,
    )


def _products(device: torch.device, dtype: torch.dtype) -> list[tuple[int, Callable[[], Any]]]:
    """Square matrix products that may be the device's fastest, each with its side."""
    if device.type == "cuda":
        return [(8192, _torch_product(8192, device, dtype))]
    # The large one fills many cores; the other is done before a busy machine takes the core away.
    products = [(384, _torch_product(384, device, dtype))]
    for side in (384, 1024):
        products += [(side, _torch_product(side, device, torch.float32))]
        products += [(side, _onnx_product(side))]
    return products


def _torch_product(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """A square matrix product in torch."""
    a = torch.randn(side, side, device=device).to(dtype)
    b, out = a.clone(), a.clone()
    return lambda: torch.mm(a, b, out=out)


def _onnx_product(side: int) -> Callable[[], Any]:
    """The same in ONNX Runtime, in fp32 on the CPU."""
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
