"""The ways a model can be run: torch (eager, compiled, CUDA graph) and ONNX Runtime's providers.

Each runtime is a class with one verb: `load` a subject for a device, precision and batch, and get a
call that runs one inference and returns when the device is done.
"""

import copy
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime
import torch
from torch import Tensor, nn

from converter.errors import StiefelError
from export import parity
from export.ceilings import DTYPES, synchronise
from export.doctor import PROVIDERS, compiler, hush, preload, quiet_options, try_provider
from export.onnx import OnnxSettings, export_onnx, size_on_disk

Call = Callable[[], Any]


@dataclass
class Subject:
    """One of the models compared: a compact module, an ONNX file, or both."""

    name: str
    module: nn.Module | None = None
    onnx: Path | None = None
    load_seconds: float = 0.0  # reading the module's checkpoint, where there is one
    file_size_bytes: int | None = None
    made: dict[str, Path] = field(default_factory=dict)  # ONNX files made for the benchmark

    def onnx_file(self, precision: str, x: Tensor, folder: Path) -> Path | None:
        """The ONNX file in this precision, exported on first use; None if there can't be one."""
        if self.onnx is not None and onnx_precision(self.onnx) == precision:
            return self.onnx
        if self.module is None or precision == "bf16":
            return None
        if precision not in self.made:
            path = folder / f"{len(list(folder.iterdir()))}-{precision}.onnx"
            settings = OnnxSettings(precision=precision)
            export_onnx(self.module, path, example=x[:1], settings=settings)
            self.made[precision] = path
        return self.made[precision]


@dataclass(frozen=True)
class Loaded:
    """A model ready to be called."""

    call: Call
    file_size_bytes: int


class Runtime(ABC):
    """One way to run a model."""

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")

    def check(self, device: torch.device) -> None:  # noqa: B027, most have nothing to check
        """Raise StiefelError if this runtime can't work here."""

    @abstractmethod
    def takes(self, subject: Subject, precision: str) -> bool:
        """Whether the subject has a form that this runtime runs in this precision."""

    @abstractmethod
    def load(
        self, subject: Subject, device: torch.device, precision: str, x: Tensor, folder: Path
    ) -> Loaded:
        """Make the subject ready for batches shaped as `x` (N, ...) float32 on the CPU.

        `folder` is for files made on the way; they are made before the clock of a later load runs.
        """


class Eager(Runtime):
    """torch as it is."""

    name = "torch"

    def takes(self, subject: Subject, precision: str) -> bool:
        """Needs the module."""
        return subject.module is not None

    def load(
        self, subject: Subject, device: torch.device, precision: str, x: Tensor, folder: Path
    ) -> Loaded:
        """Copy the module to the device."""
        model, x = self._placed(subject.module, device, precision, x)
        run = self._runner(model, x)

        def call() -> Any:
            result = run()
            synchronise(device)
            return result

        size = sum(t.nbytes for t in model.state_dict().values())
        return Loaded(call, subject.file_size_bytes or size)

    def _placed(
        self, model: nn.Module, device: torch.device, precision: str, x: Tensor
    ) -> tuple[nn.Module, Tensor]:
        dtype = DTYPES[precision]
        return copy.deepcopy(model).to(device, dtype).eval(), x.to(device, dtype)

    def _runner(self, model: nn.Module, x: Tensor) -> Call:
        def run() -> Any:
            with torch.inference_mode():
                return model(x)

        return run


class Compiled(Eager):
    """torch.compile with its defaults; compilation counts as loading."""

    name = "torch-compile"

    def check(self, device: torch.device) -> None:
        """On the CPU it needs a compiler."""
        if device.type == "cpu" and compiler() is None:
            raise StiefelError(f"{self.name} on the CPU needs a C++ compiler such as g++")

    def _runner(self, model: nn.Module, x: Tensor) -> Call:
        compiled = torch.compile(model, dynamic=False)

        def run() -> Any:
            with torch.no_grad():
                return compiled(x)

        try:
            run()
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise StiefelError(
                f"torch.compile fails: {reason[0][:200] if reason else type(error).__name__} "
                "(`stiefel doctor` says whether there is a compiler)"
            ) from error
        return run


class CudaGraph(Eager):
    """One CUDA graph of the whole forward pass, replayed."""

    name = "torch-cudagraph"
    devices = ("cuda",)

    def _runner(self, model: nn.Module, x: Tensor) -> Call:
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(3):  # kernels choose their algorithms before the capture
                model(x)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            result = model(x)
        return partial(_replay, graph, result, model, x)


def _replay(graph: torch.cuda.CUDAGraph, result: Any, *read: Any) -> Any:
    """Run the graph; `read`, weights and images, must live as long, where they lie."""
    graph.replay()
    return result


class OnnxRuntime(Runtime):
    """ONNX Runtime; on CUDA with inputs and outputs bound to the device."""

    name = "onnxruntime"
    precisions = ("fp32", "fp16")

    def takes(self, subject: Subject, precision: str) -> bool:
        """Needs an ONNX file of this precision, or a module to export."""
        if subject.module is not None:
            return True
        return subject.onnx is not None and onnx_precision(subject.onnx) == precision

    def check(self, device: torch.device) -> None:
        """The provider must really load."""
        provider = self.provider(device)
        if why := try_provider(provider):
            raise StiefelError(
                f"ONNX Runtime's {provider} does not work here: {why}; `stiefel doctor` says more"
            )

    def provider(self, device: torch.device) -> str:
        """The execution provider for the device."""
        return PROVIDERS["cuda" if device.type == "cuda" else "cpu"]

    def load(
        self, subject: Subject, device: torch.device, precision: str, x: Tensor, folder: Path
    ) -> Loaded:
        """Open a session on the file."""
        path = subject.onnx_file(precision, x, folder)
        session = self._session(path, device)
        if device.type == "cuda":
            self._refuse_fallback(subject, path, device, x)
            call = _bound_call(session, x.to(device, DTYPES[precision]))
        else:
            feed = {session.get_inputs()[0].name: x.to(DTYPES[precision]).numpy()}

            def call() -> Any:
                return session.run(None, feed)

        return Loaded(call, size_on_disk(path))

    def _session(
        self, path: Path, device: torch.device, profile: str | None = None
    ) -> onnxruntime.InferenceSession:
        options = quiet_options()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Otherwise one model's idle threads spin while the other's turn is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        wanted = self.provider(device)
        provider = (wanted, {"device_id": device.index or 0}) if device.type == "cuda" else wanted
        if device.type == "cuda":
            preload()
        try:
            with hush():
                session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:
            raise StiefelError(f"{path}: {parity.reason(error)}") from error
        if session.get_providers()[0] != wanted:
            raise StiefelError(f"ONNX Runtime refused {wanted}; `stiefel doctor` says why")
        return session

    def _refuse_fallback(
        self, subject: Subject, path: Path, device: torch.device, x: Tensor
    ) -> None:
        """Raise StiefelError if nodes that compute run on the CPU."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._session(path, device, profile=os.path.join(folder, "profile"))
            parity.run(session, x)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        nodes = fallen_back(events)
        if nodes:
            more = f" and {len(nodes) - 5} more" if len(nodes) > 5 else ""
            raise StiefelError(
                f"{subject.name}: not a CUDA figure, for {len(nodes)} nodes fell back to the CPU "
                f"provider: {', '.join(nodes[:5])}{more}"
            )


class TensorRT(OnnxRuntime):
    """ONNX Runtime's TensorRT provider, what it can't take on CUDA."""

    name = "onnxruntime-tensorrt"
    devices = ("cuda",)

    def provider(self, device: torch.device) -> str:
        """TensorRT's."""
        return PROVIDERS["tensorrt"]


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (Eager(), Compiled(), CudaGraph(), OnnxRuntime(), TensorRT())
}


def fallen_back(events: Iterable[dict[str, Any]]) -> list[str]:
    """Nodes that a profile of ONNX Runtime shows on the CPU provider, in order, each once.

    Arithmetic on shapes (a few integers) belongs on the CPU and is not counted.
    """
    nodes: dict[str, None] = {}
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") != "Node" or arguments.get("provider") != PROVIDERS["cpu"]:
            continue
        outputs = arguments.get("output_type_shape", [])
        kinds = {kind for output in outputs for kind in output}
        sizes = [len(shape) for output in outputs for shape in output.values()]
        if kinds <= {"int64", "int32", "bool"} and all(size <= 1 for size in sizes):
            continue
        nodes[event["name"].removesuffix("_kernel_time")] = None
    return list(nodes)


def onnx_precision(path: Path) -> str:
    """fp32 or fp16, by the file's first input.

    Raises:
        StiefelError: the file isn't ONNX or takes neither.
    """
    kind = parity.session(path).get_inputs()[0].type
    known = {"tensor(float)": "fp32", "tensor(float16)": "fp16"}
    if kind not in known:
        raise StiefelError(f"{path} takes {kind}; bench knows float and float16")
    return known[kind]


def _bound_call(session: onnxruntime.InferenceSession, x: Tensor) -> Call:
    """A call with its input already on the device and its outputs left there."""
    binding, x = session.io_binding(), x.contiguous()
    element = {torch.float32: 1, torch.float16: 10}[x.dtype]
    index = x.device.index or 0
    name = session.get_inputs()[0].name
    binding.bind_input(name, "cuda", index, element, tuple(x.shape), x.data_ptr())
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda", index)
    torch.cuda.synchronize(x.device)

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        torch.cuda.synchronize(x.device)
        return x  # keeps the bound memory alive

    return call
