"""What this installation can do: versions, devices, providers that really load, and remedies."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import shutil
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from converter.errors import first_line

PACKAGES = (
    "stiefel torch torchvision onnx onnxscript onnxruntime-gpu onnxruntime safetensors numpy timm "
    "tensorrt-cu13"
)
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def stiefel_version() -> str:
    """The installed version, or 'unknown' in a bare source tree."""
    return _version("stiefel") or "unknown"


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What a measurement depends on, as plain data: versions, device, threads."""
    device = torch.device(device)
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name.replace("-", "_"): v for name in PACKAGES.split() if (v := _version(name))},
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        facts |= _gpu(device.index or 0)
    return facts


def doctor() -> dict[str, Any]:
    """Versions, devices, and ONNX Runtime's providers, each tried on a tiny model.

    Returns:
        `environment`; `devices`: one dict each; `providers`: name to "loads" or why it doesn't;
        `compiler`: the C++ compiler that torch.compile needs on the CPU, or None; `remedies`:
        lines that say what to do about what is missing.
    """
    found = {name: try_provider(provider) for name, provider in PROVIDERS.items()}
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    report: dict[str, Any] = {
        "environment": environment(),
        "devices": [{"device": "cpu", "name": _processor(), "cores": os.cpu_count()}]
        + [{"device": f"cuda:{i}"} | _gpu(i) for i in gpus],
        "cuda_build": torch.version.cuda,
        "providers": {name: "loads" if why is None else why for name, why in found.items()},
        "compiler": compiler(),
    }
    report["remedies"] = list(_remedies(report, found))
    return report


def compiler() -> str | None:
    """The C++ compiler that torch.compile needs on the CPU, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


@cache
def try_provider(provider: str) -> str | None:
    """None if ONNX Runtime really runs a model with the provider, else the reason in one line."""
    if provider not in onnxruntime.get_available_providers():
        return "not part of this onnxruntime package"
    said = io.StringIO()
    try:
        with hush(said):
            preload(said)
            session = onnxruntime.InferenceSession(_tiny(), quiet_options(), providers=[provider])
            if session.get_providers()[0] == provider:
                session.run(None, {"x": np.ones((1, 4), np.float32)})
                return None
    except Exception as error:
        return first_line(error)[:300]
    if provider == PROVIDERS["tensorrt"] and importlib.util.find_spec("tensorrt_libs") is None:
        return "TensorRT's libraries are not installed"
    return _missing_library(said.getvalue()) or "does not load"


def preload(said: io.StringIO | None = None) -> None:
    """Load the libraries of CUDA, cuDNN and TensorRT that wheels brought, for ONNX Runtime."""
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("tensorrt_libs")  # loads what lies in it, off the loader's path
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(said or io.StringIO()):
            onnxruntime.preload_dlls()


def quiet_options() -> onnxruntime.SessionOptions:
    """Session options that log nothing."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options


@contextlib.contextmanager
def hush(said: io.StringIO | None = None):
    """Silence ONNX Runtime's prints and its default logger; collect what was printed in `said`."""
    onnxruntime.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(said or io.StringIO()):
            yield
    finally:
        onnxruntime.set_default_logger_severity(2)


def _remedies(report: dict[str, Any], found: dict[str, str | None]):
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            yield "torch is a CPU build; for a GPU install the CUDA build from pytorch.org"
        else:
            yield (
                f"torch is built for CUDA {torch.version.cuda} but sees no GPU: fine on a machine "
                "without one; else check the driver with nvidia-smi"
            )
    if found["cuda"] and "libcurand" in found["cuda"]:
        yield (
            "ONNX Runtime's CUDA provider lacks cuRAND, which torch's wheels don't bring: "
            "pip install nvidia-curand"
        )
    elif found["cuda"] and torch.cuda.is_available():
        yield (
            f"ONNX Runtime's CUDA provider: {found['cuda']}; onnxruntime-gpu 1.31 needs CUDA 13 "
            "and cuDNN 9: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    if found["tensorrt"] and torch.cuda.is_available():
        yield "TensorRT is optional: pip install tensorrt-cu13"
    if report["compiler"] is None:
        yield "torch.compile on the CPU needs a C++ compiler such as g++"
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        yield (
            "onnxruntime and onnxruntime-gpu hide each other: pip uninstall onnxruntime, "
            "then reinstall onnxruntime-gpu"
        )


def _missing_library(said: str) -> str | None:
    """Which shared library the dynamic loader lacks, from what preload_dlls printed."""
    lines = [line for line in said.splitlines() if line.startswith("Failed to load")]
    return lines[0] if lines else None


def _tiny() -> bytes:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "tiny", [x], [y])
    opset = [onnx.helper.make_opsetid("", 18)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
