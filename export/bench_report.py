"""What a benchmark found, as plain data and as Markdown."""

from typing import Any

from pydantic import Field

from converter.settings import Settings


class BenchRow(Settings):
    """One model in one runtime, device, precision and batch."""

    model: str
    runtime: str
    device: str
    precision: str
    batch: int = Field(description="images per call")
    latency_ms_p50: float
    latency_ms_p95: float
    latency_ms_p99: float
    throughput_per_s: float = Field(description="images per second at the median")
    peak_memory_mib: float | None = Field(description="what loading and running it added")
    load_time_ms: float = Field(description="from the source to ready, compilation included")
    file_size_bytes: int
    calls: int = Field(description="timed calls")
    gflops_per_s: float = Field(description="achieved, two operations per multiply-add")
    gbytes_per_s: float = Field(description="achieved on the operands of products, each once")
    compute_fraction: float = Field(description="of the device's measured matrix product")
    bandwidth_fraction: float = Field(description="of the device's measured copy")


class BenchRatio(Settings):
    """How much faster a model is than the first one, round by round."""

    model: str
    baseline: str
    runtime: str
    device: str
    precision: str
    batch: int
    speedup: float = Field(description="baseline's time over the model's, median of rounds")
    speedup_low: float = Field(description="lower end of the median's 95 % interval")
    speedup_high: float = Field(description="upper end")
    within_noise: bool = Field(description="the interval holds 1 give or take 2 %")


class BenchReport(Settings):
    """All rows, ratios and ceilings of one benchmark."""

    rows: tuple[BenchRow, ...]
    ratios: tuple[BenchRatio, ...]
    ceilings: tuple[dict[str, Any], ...] = Field(description="measured limits of each device")
    environment: dict[str, Any]

    def markdown(self) -> str:
        """The rows with their speed-ups, the ceilings, and where it was measured."""
        ratios = {(r.model, *_place(r)): r for r in self.ratios}
        header = (
            "model | runtime | device | precision | batch | p50 ms | p95 ms | p99 ms | images/s "
            "| speed-up (95 %) | peak MiB | load ms | file MiB | GFLOP/s | GB/s"
        )
        lines = [f"| {header} |", "|" + " --- |" * 4 + " ---: |" * 11]
        for row in self.rows:
            memory = "–" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.1f}"
            cells = (
                row.model,
                *map(str, _place(row)),
                *(f"{x:.3f}" for x in (row.latency_ms_p50, row.latency_ms_p95, row.latency_ms_p99)),
                f"{row.throughput_per_s:,.0f}",
                _speedup(ratios.get((row.model, *_place(row)))),
                memory,
                f"{row.load_time_ms:.0f}",
                f"{row.file_size_bytes / 2**20:.2f}",
                f"{row.gflops_per_s:.1f} ({row.compute_fraction:.0%})",
                f"{row.gbytes_per_s:.1f} ({row.bandwidth_fraction:.0%})",
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        lines += [
            f"Ceilings of {limit['device']} in {limit['precision']}: "
            f"{limit['gflops_per_s']:.0f} GFLOP/s (matrix product), "
            f"{limit['gbytes_per_s']:.1f} GB/s (copy)."
            for limit in self.ceilings
        ]
        lines += ["", "; ".join(f"{key} {value}" for key, value in self.environment.items()), ""]
        return "\n".join(lines)


def _place(row: BenchRow | BenchRatio) -> tuple[str, str, str, int]:
    return row.runtime, row.device, row.precision, row.batch


def _speedup(ratio: BenchRatio | None) -> str:
    if ratio is None:
        return "baseline"
    text = f"{ratio.speedup:.2f}× ({ratio.speedup_low:.2f}–{ratio.speedup_high:.2f})"
    return text + ", within noise" if ratio.within_noise else text
