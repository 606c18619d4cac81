"""How much memory a model takes: the process's resident set on the CPU, the device's on CUDA."""

import contextlib
import ctypes
import gc
import sys

import torch

MIB = 2**20


class PeakMemory:
    """The memory that loading and running a model adds, measured in this process.

    On CUDA the device's used memory, so that ONNX Runtime's arena counts too: allocators keep what
    they once took. On Linux CPUs the resident set: what the loaded model holds plus the most that
    its calls add on top. Elsewhere None.
    """

    def __init__(self, device: torch.device):
        self.device = device
        _release(device)
        self._start = self._now()

    def loaded(self) -> None:
        """The model is there; from here on count the peak of its calls."""
        if self.device.type != "cuda":
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")

    def peak_mib(self) -> float | None:
        """MiB above the start, at the worst moment so far; None where it can't be told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return max(0.0, self._now() - self._start) / MIB
        peak = _status("VmHWM")
        return None if peak is None else max(0.0, peak - self._start) / MIB

    def _now(self) -> float:
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return float(total - free)
        return float(_status("VmRSS") or 0)


def _release(device: torch.device) -> None:
    """Give back what earlier models held, so that it isn't reused unseen."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(key: str) -> int | None:
    """Bytes of one line of Linux's /proc/self/status."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None
