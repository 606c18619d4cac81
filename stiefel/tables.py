"""Short human summaries of what the rooms return, for the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from rich.markup import escape
from rich.table import Table

from converter.errors import StiefelError
from converter.inspect import Inspection
from converter.rank_plan import RankPlan
from export.bench_report import BenchReport
from export.result import ExportResult


def as_yaml(document: Mapping[str, Any]) -> str:
    """Plain data as YAML, in its own order."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def grid(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> Table:
    """A table whose first `left` columns stand to the left, the others to the right."""
    view = Table(title=title or None, title_justify="left", caption_justify="left")
    for place, name in enumerate(header):
        view.add_column(name, justify="left" if place < left else "right", overflow="fold")
    for row in rows:
        view.add_row(*(shown(cell) for cell in row))
    return view


def shown(value: Any) -> str:
    """A cell: numbers grouped by thousands, small fractions to three digits, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, tuple | list):
        return "×".join(str(part) for part in value)
    return str(value)


def plain(result: Any) -> Any:
    """A result of any room as data that JSON can hold; what is not finite is null there."""
    if isinstance(result, BaseModel):
        return result.model_dump(mode="json")
    if isinstance(result, float) and not math.isfinite(result):
        return None
    if is_dataclass(result):
        return plain(asdict(result))
    if isinstance(result, Mapping):
        return {str(key): plain(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [plain(value) for value in result]
    return str(result) if isinstance(result, Path) else result


def plan_table(plan: RankPlan) -> Table:
    """What becomes of each layer, and of the whole."""
    rows = [
        (
            layer.name,
            layer.kind,
            layer.shape,
            "dense" if layer.rank is None else layer.scheme or "matrix",
            "" if layer.rank is None else f"{layer.rank} of {layer.full_rank}",
            layer.dense_parameters,
            layer.factored_parameters,
            layer.expected_error if layer.rank is not None else None,
        )
        for layer in plan.layers
    ]
    header = ["layer", "kind", "shape", "scheme", "rank", "parameters", "planned", "error"]
    view = grid(f"Rank plan, {plan.policy}: {totals(plan)}", header, rows, left=4)
    view.caption = _reasons((layer.reason, layer.name) for layer in plan.layers)
    return view


def totals(plan: RankPlan) -> str:
    """Parameters and multiply-adds, before and after, in one line."""
    line = _change("parameters", plan.dense_parameters, plan.factored_parameters)
    if plan.dense_macs and plan.factored_macs is not None:
        line += ", " + _change("MACs", plan.dense_macs, plan.factored_macs)
    return line


def inspection_table(found: Inspection) -> Table:
    """Every layer as it is."""
    rows = [
        (
            row.name,
            row.kind,
            row.shape,
            row.scheme or "",
            "" if row.rank is None else f"{row.rank} of {row.full_rank}",
            row.parameters,
            row.macs,
            row.error,
        )
        for row in found.layers
    ]
    header = ["layer", "kind", "shape", "scheme", "rank", "parameters", "MACs", "error"]
    title = f"{found.parameters:,} parameters, {found.macs:,} MACs an image"
    view = grid(title, header, rows, left=4)
    view.caption = _reasons((row.reason, row.name) for row in found.layers)
    return view


def bench_table(result: BenchReport) -> Table:
    """Every timing, with the speed-up against the first model."""
    speedups = {
        (r.model, r.runtime, r.device, r.precision, r.batch): f"{r.speedup:.2f}×"
        for r in result.ratios
    }
    rows = []
    for row in result.rows:
        place = (row.model, row.runtime, row.device, row.precision, row.batch)
        times = (row.latency_ms_p50, row.latency_ms_p95, row.latency_ms_p99)
        rows.append((*place, *times, f"{row.throughput_per_s:,.0f}", speedups.get(place, "")))
    header = ["model", "runtime", "device", "precision", "batch"]
    return grid("", [*header, "p50 ms", "p95 ms", "p99 ms", "images/s", "speed-up"], rows, left=4)


def resources_table(result: BenchReport) -> Table:
    """What each model takes besides time, and how near it comes to what the device can do."""
    rows = [
        (
            *(row.model, f"{row.runtime}, {row.device}, {row.precision}", row.batch),
            None if row.peak_memory_mib is None else f"{row.peak_memory_mib:.1f}",
            f"{row.load_time_ms:.0f}",
            f"{row.file_size_bytes / 2**20:.2f}",
            f"{row.gflops_per_s:.1f} ({row.compute_fraction:.0%})",
            f"{row.gbytes_per_s:.1f} ({row.bandwidth_fraction:.0%})",
        )
        for row in result.rows
    ]
    header = ["model", "where", "batch", "peak MiB", "load ms", "file MiB", "GFLOP/s", "GB/s"]
    view = grid("", header, rows, left=2)
    limits = [
        f"{c['device']}, {c['precision']}: {c['gflops_per_s']:.0f} GFLOP/s, "
        f"{c['gbytes_per_s']:.1f} GB/s"
        for c in result.ceilings
    ]
    view.caption = "In brackets: of what the device reached, " + "; ".join(limits) + "."
    return view


def cuts_table(blocks: Sequence[Mapping[str, Any]]) -> Table:
    """The local blocks: what trains together, and the tensors that leave each block."""
    rows = [
        (
            block["block"],
            ", ".join(block["layers"]),
            block["parameters"],
            ", ".join(shown(root["shape"]) for root in block["roots"]),
        )
        for block in blocks
    ]
    return grid(f"{len(rows)} local blocks", ["block", "layers", "parameters", "leaves"], rows, 2)


def doctor_table(found: Mapping[str, Any]) -> Table:
    """What this installation can do, with what to do about the rest."""
    rows = [(key.replace("_", " "), str(value)) for key, value in found["environment"].items()]
    rows += [
        (device["device"], ", ".join(f"{k} {v}" for k, v in device.items() if k != "device"))
        for device in found["devices"]
        if device["device"] != "cpu"
    ]
    rows += [(f"ONNX Runtime, {name}", said) for name, said in found["providers"].items()]
    rows += [("compiler", found["compiler"] or "none: torch.compile needs one on the CPU")]
    rows += [("to do", remedy) for remedy in found["remedies"]]
    return grid("stiefel doctor", ["", ""], rows, left=2)


def export_line(result: ExportResult) -> str:
    """What was written and what was proved of it."""
    merged = f", {len(result.merged)} merged back to dense" if result.merged else ""
    folded = f", {len(result.folded)} batch norms folded" if result.folded else ""
    what = {"layers": "values inside the network", "tensors": "numbers of its tensors"}
    return (
        f"Wrote {result.path} ({bytes_text(result.file_size_bytes)}, {result.precision}): "
        f"{len(result.ranks)} factored layers{merged}{folded}. Largest difference from torch: "
        f"{result.max_abs_error:.1e} over {result.outputs_compared:,} "
        f"{what.get(result.compared, result.compared)}."
    )


def read_plan(path: Path) -> RankPlan:
    """A plan from its JSON file.

    Raises:
        StiefelError: the file can't be read or is no plan.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StiefelError(f"cannot read plan {path}: {error}") from error
    try:
        return RankPlan.from_json(text)
    except StiefelError as error:
        raise StiefelError(f"{path}: {error}") from error


def file_size(path: Path) -> str:
    """The size of a file, in KiB or MiB."""
    return bytes_text(path.stat().st_size)


def bytes_text(size: float) -> str:
    """A number of bytes in KiB or MiB."""
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def _reasons(pairs: Iterable[tuple[str | None, str]]) -> str | None:
    """Why layers stayed dense: each reason once, with the layers that it holds for."""
    layers: dict[str, list[str]] = {}
    for reason, name in pairs:
        if reason:
            layers.setdefault(reason, []).append(name)
    lines = [f"Dense, {reason}: {', '.join(names)}" for reason, names in layers.items()]
    return escape("\n".join(lines)) or None


def _change(what: str, before: int, after: int) -> str:
    return f"{before:,} → {after:,} {what} ({after / before:.1%})"
