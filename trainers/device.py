"""Which device computes, and in which precision."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from converter.errors import StiefelError

try:
    import resource
except ImportError:  # Windows
    resource = None

DeviceName = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]

_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str | torch.device) -> torch.device:
    """'auto' takes CUDA where there is one; a process that torchrun started takes its own GPU.

    Raises:
        StiefelError: CUDA is asked for where there is none.
    """
    if isinstance(name, torch.device):
        name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        built = (
            f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        )
        raise StiefelError(
            f"device {name} was asked for, but torch ({built}) sees no CUDA device; use device cpu"
        )
    index = torch.device(name).index
    if index is None:
        index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise StiefelError(
            f"device cuda:{index} was asked for, but there are {torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", index)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """Products and convolutions in `precision`, parameters and reductions in float32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_LOW[precision])


def wide(tensor: Tensor) -> Tensor:
    """At least float32: for means and norms, whatever autocast yields."""
    return tensor.float() if tensor.dtype in _LOW.values() else tensor


def peak_memory_mib(device: torch.device) -> float | None:
    """The most memory held since the process began: torch's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    # Linux counts KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
