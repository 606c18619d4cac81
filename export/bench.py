"""Models timed side by side: A B A B rounds, so that what drifts drifts for both."""

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from converter.errors import StiefelError
from converter.settings import Settings
from export import parity, workload
from export.bench_report import BenchRatio, BenchReport, BenchRow
from export.ceilings import DTYPES, Ceiling, ceiling
from export.doctor import environment
from export.memory import PeakMemory
from export.runtimes import RUNTIMES, Loaded, Runtime, Subject
from export.subjects import Source, input_shape, subjects_of
from trainers.device import resolve_device

Progress = Callable[[str, int, int], None]
RuntimeName = Literal[
    "torch", "torch-compile", "torch-cudagraph", "onnxruntime", "onnxruntime-tensorrt"
]


class BenchSettings(Settings):
    """What is timed and how long."""

    runtimes: tuple[RuntimeName, ...] = Field(
        ("torch", "onnxruntime"), min_length=1, description="what runs the models"
    )
    devices: tuple[Literal["auto", "cpu", "cuda"], ...] = Field(
        ("auto",), min_length=1, description="where; auto is CUDA if there is one, else the CPU"
    )
    batches: tuple[int, ...] = Field((1, 8, 64), min_length=1, description="images per call")
    precisions: tuple[Literal["fp32", "fp16", "bf16"], ...] = Field(
        ("fp32",), min_length=1, description="number formats"
    )
    image_size: int | None = Field(
        None, ge=1, description="height and width of the images (default: the model's)"
    )
    rounds: int = Field(9, ge=3, description="rounds of A B A B; the ratio's spread is over rounds")
    calls: int = Field(20, ge=1, description="timed calls of each model in a round, at most")
    warmup: int = Field(5, ge=1, description="calls before the clock runs")
    seconds: float = Field(
        2.0, gt=0, description="time for one model in one setting; calls are cut to fit, not rounds"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads (default: torch's)")


def bench(
    models: Mapping[str, Source] | Sequence[Source],
    settings: BenchSettings | None = None,
    *,
    modules: Mapping[str, nn.Module] | None = None,
    example: Tensor | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Time models against the first of them, in every runtime, device, precision and batch.

    Args:
        models: modules, ONNX files, checkpoints (dense, factored or compact) or `torchvision:NAME`.
            Modules are timed in compact form.
        modules: for a name whose source is an ONNX file, the module that torch's runtimes take.
        example: one input (N, ...) for its shape; the models' own when None.

    Raises:
        StiefelError: a source can't be read, the models take different inputs, a runtime or device
            is not there, or a node that should run on CUDA fell back to the CPU.
    """
    settings = settings or BenchSettings()
    found = places(settings)
    devices = list(dict.fromkeys(device for _, device in found))
    with _threads(settings.threads), tempfile.TemporaryDirectory() as folder:
        subjects = subjects_of(models, modules or {})
        shape = input_shape(subjects, example, settings.image_size)
        plan = [
            (runtime, device, precision, batch)
            for runtime, device in found
            for precision in settings.precisions
            for batch in settings.batches
        ]
        _refuse_untimed(subjects, {(runtime, precision) for runtime, _, precision, _ in plan})
        ceilings = {
            (str(device), precision): ceiling(device, precision)
            for device in devices
            for precision in settings.precisions
        }
        rows, ratios = [], []
        for done, (runtime, device, precision, batch) in enumerate(plan):
            if progress:
                place = f"{runtime.name}, {device}, {precision}, batch {batch}"
                progress(place, done, len(plan))
            x = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(0))
            taking = [s for s in subjects if _takes(runtime, s, precision)]
            cells = _time(runtime, taking, device, precision, x, Path(folder), settings)
            limit = ceilings[str(device), precision]
            rows += [_row(cell, runtime, device, precision, x, limit) for cell in cells]
            ratios += [_ratio(cells[0], c, runtime, device, precision, batch) for c in cells[1:]]
        if progress:
            progress("done", len(plan), len(plan))
        facts = environment(devices[-1]) | {"input_shape": list(shape)}
    return BenchReport(
        rows=tuple(rows),
        ratios=tuple(ratios),
        ceilings=tuple(vars(limit) for limit in ceilings.values()),
        environment=facts,
    )


class _Cell:
    """One model in one setting: how it loads, and its times."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.loaded: Loaded | None = None
        self.load_ms = 0.0
        self.peak_mib: float | None = None
        self.rounds: list[list[float]] = []  # seconds of each call

    @property
    def seconds(self) -> list[float]:
        return [second for turn in self.rounds for second in turn]


def _time(
    runtime: Runtime,
    subjects: list[Subject],
    device: torch.device,
    precision: str,
    x: Tensor,
    folder: Path,
    settings: BenchSettings,
) -> list[_Cell]:
    cells = [_Cell(subject) for subject in subjects]
    turns = []
    for cell in cells:
        if isinstance(runtime, type(RUNTIMES["onnxruntime"])):
            cell.subject.onnx_file(precision, x, folder)  # not part of loading
        memory = PeakMemory(device)
        start = time.perf_counter()
        with _failures_named(cell.subject, runtime, x):
            cell.loaded = runtime.load(cell.subject, device, precision, x, folder)
            cell.load_ms = 1e3 * (time.perf_counter() - start + cell.subject.load_seconds)
            memory.loaded()
            each = _warm_up(cell.loaded.call, settings)
        cell.peak_mib = memory.peak_mib()
        turns.append(max(1, min(settings.calls, int(settings.seconds / settings.rounds / each))))
    gc.collect()
    gc.disable()
    try:
        for _ in range(settings.rounds):
            for cell, calls in zip(cells, turns, strict=True):
                cell.rounds.append(_timed(cell.loaded.call, calls))
    finally:
        gc.enable()
    for cell in cells:
        cell.size, cell.loaded = cell.loaded.file_size_bytes, None
    return cells


@contextmanager
def _failures_named(subject: Subject, runtime: Runtime, x: Tensor):
    """Turn whatever a model's code or its runtime raises into one line."""
    try:
        yield
    except StiefelError:
        raise
    except Exception as error:
        raise StiefelError(
            f"{subject.name} fails in {runtime.name} on an input {'×'.join(map(str, x.shape))}: "
            f"{parity.reason(error)}"
        ) from error


def _warm_up(call: Callable[[], object], settings: BenchSettings) -> float:
    """Call until warm; seconds of the fastest call."""
    times: list[float] = []
    while len(times) < settings.warmup and (len(times) < 2 or sum(times) < settings.seconds):
        times += _timed(call, 1)
    return min(times)


def _timed(call: Callable[[], object], calls: int) -> list[float]:
    """Seconds of each call; the call returns when the device is done."""
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        times.append(1e-9 * (time.perf_counter_ns() - start))
    return times


def _row(
    cell: _Cell,
    runtime: Runtime,
    device: torch.device,
    precision: str,
    x: Tensor,
    limit: Ceiling,
) -> BenchRow:
    p50, p95, p99 = np.percentile(cell.seconds, (50, 95, 99))
    work = _workload(cell.subject, precision, x)
    return BenchRow(
        model=cell.subject.name,
        runtime=runtime.name,
        device=str(device),
        precision=precision,
        batch=len(x),
        latency_ms_p50=1e3 * p50,
        latency_ms_p95=1e3 * p95,
        latency_ms_p99=1e3 * p99,
        throughput_per_s=len(x) / p50,
        peak_memory_mib=cell.peak_mib,
        load_time_ms=cell.load_ms,
        file_size_bytes=cell.size,
        calls=len(cell.seconds),
        gflops_per_s=work.gflops_per_s(p50),
        gbytes_per_s=work.gbytes_per_s(p50),
        compute_fraction=work.gflops_per_s(p50) / limit.gflops_per_s,
        bandwidth_fraction=work.gbytes_per_s(p50) / limit.gbytes_per_s,
    )


def _workload(subject: Subject, precision: str, x: Tensor) -> workload.Workload:
    if subject.module is not None:
        return workload.of_module(subject.module, x, DTYPES[precision].itemsize)
    return workload.of_onnx(subject.onnx, tuple(x.shape))


def _ratio(
    baseline: _Cell,
    cell: _Cell,
    runtime: Runtime,
    device: torch.device,
    precision: str,
    batch: int,
) -> BenchRatio:
    """Baseline's time over the model's, round by round."""
    each = sorted(
        statistics.median(one) / statistics.median(other)
        for one, other in zip(baseline.rounds, cell.rounds, strict=True)
    )
    low, high = median_interval(each)
    return BenchRatio(
        model=cell.subject.name,
        baseline=baseline.subject.name,
        runtime=runtime.name,
        device=str(device),
        precision=precision,
        batch=batch,
        speedup=statistics.median(each),
        speedup_low=low,
        speedup_high=high,
        within_noise=low <= 1 + NOISE and high >= 1 - NOISE,
    )


# Two copies of one model differ by about this much for where they lie in memory.
NOISE = 0.02


def median_interval(ordered: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The interval between order statistics that covers the median with at least `confidence`.

    It assumes nothing of the distribution (David & Nagaraja, Order Statistics, 2003, section 7.1).
    Below six values the whole range is the best there is.

    Args:
        ordered: values in ascending order.
    """
    n, below, k = len(ordered), 0.0, 0
    while k < n // 2:
        below += math.comb(n, k) / 2**n
        if 2 * below > 1 - confidence:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def places(settings: BenchSettings) -> list[tuple[Runtime, torch.device]]:
    """Each runtime on each device that it knows, all of which work here.

    Raises:
        StiefelError: a runtime or device is not there.
    """
    devices = list(dict.fromkeys(resolve_device(name) for name in settings.devices))
    found = []
    for device in devices:
        for name in settings.runtimes:
            runtime = RUNTIMES[name]
            if device.type in runtime.devices:
                runtime.check(device)
                found.append((runtime, device))
            elif len(devices) == 1:
                raise StiefelError(f"{name} runs on {runtime.devices[0]} only, not on {device}")
    return found


def _refuse_untimed(subjects: list[Subject], ways: set[tuple[Runtime, str]]) -> None:
    """Raise StiefelError if a model would not be timed at all, rather than leave it out unsaid."""
    for subject in subjects:
        if not any(_takes(runtime, subject, precision) for runtime, precision in ways):
            asked = " or ".join(
                sorted(f"{runtime.name} in {precision}" for runtime, precision in ways)
            )
            raise StiefelError(
                f"{subject.name}: nothing to time in {asked}; only ONNX Runtime takes ONNX files, "
                "in the precision they were written in, and it takes fp32 and fp16 only"
            )


def _takes(runtime: Runtime, subject: Subject, precision: str) -> bool:
    return precision in runtime.precisions and runtime.takes(subject, precision)


@contextmanager
def _threads(count: int | None):
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
