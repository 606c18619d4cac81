"""One result, three renderings: a table in the terminal, JSON for machines, Markdown with plots."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from converter.files import write_text
from stiefel.plots import draw_comparison, draw_diagnostics, draw_training
from stiefel.tables import bytes_text

Report = Mapping[str, Any]
STAGES = {"dense": "dense", "converted": "converted", "trained": "trained locally"}


class Row(NamedTuple):
    """One line of the comparison: what, and its value at each stage, ready to be read."""

    label: str
    values: tuple[str, ...]


def write(report: Report, folder: Path) -> list[Path]:
    """Write `report.json`, `report.md` and the plots into a folder that exists."""
    plots = []
    if report.get("training") or report.get("pretraining"):
        plots.append(draw_training(report, folder / "training.png"))
    looks = report.get("training", {}).get("diagnostics", ())
    if picture := draw_diagnostics(looks, folder / "diagnostics.png"):
        plots.append(picture)
    plots.append(draw_comparison(report, folder / "comparison.png"))
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(folder / "report.md", markdown(report, plots))
    return [folder / "report.json", folder / "report.md", *plots]


def stages(report: Report) -> list[str]:
    """The stages that this run has gone through, in order."""
    return [stage for stage in STAGES if report.get(stage)]


def rows(report: Report) -> Iterator[Row]:
    """The comparison, line by line: before and after."""
    present = stages(report)

    def row(label: str, key: str, show) -> Iterator[Row]:
        values = [report[stage].get(key) for stage in present]
        if any(value is not None for value in values):
            yield Row(label, tuple("–" if value is None else show(value) for value in values))

    yield from row("accuracy, test", "accuracy", lambda v: f"{100 * v:.2f} %")
    yield from row("parameters", "parameters", _count)
    yield from row("multiply-adds an image", "macs", _count)
    yield from row("file size", "file_size_bytes", bytes_text)
    yield from row("memory of activations in training", "activation_memory_mib", _mebibytes)
    for key, times in _latencies(report).items():
        values = tuple(_milliseconds(times.get(stage)) for stage in present)
        yield Row(f"latency, {key}", values)


def table(report: Report) -> Table:
    """The comparison for the terminal."""
    view = Table(title=f"{report['recipe']['name']}: before and after", title_justify="left")
    view.add_column("")
    for stage in stages(report):
        view.add_column(STAGES[stage], justify="right")
    for row in rows(report):
        view.add_row(row.label, *row.values)
    return view


def closing_lines(report: Report) -> Iterator[str]:
    """What the table doesn't say: whether the export agrees, and how much faster it is."""
    onnx = report.get("export", {}).get("onnx")
    if onnx:
        yield (
            f"ONNX Runtime agrees with torch to {onnx['max_abs_error']:.1e} "
            f"(largest difference over {onnx['outputs_compared']:,} outputs)."
        )
    for ratio in report.get("bench_ratios", []):
        yield sentence(ratio)


def sentence(ratio: Mapping[str, Any]) -> str:
    """One paired speed ratio in words."""
    place = f"{ratio['runtime']}, {ratio['device']}, {ratio['precision']}, batch {ratio['batch']}"
    spread = f"{ratio['speedup']:.2f}× ({ratio['speedup_low']:.2f}–{ratio['speedup_high']:.2f})"
    if ratio["within_noise"]:
        return f"{place}: {ratio['model']}, {spread}, no difference beyond noise."
    word = "faster" if ratio["speedup"] > 1 else "slower"
    return f"{place}: {ratio['model']} is {word} than {ratio['baseline']}, {spread}."


def markdown(report: Report, plots: list[Path]) -> str:
    """The report as a page: the comparison, plots, ranks, times, and how to repeat it."""
    present = stages(report)
    lines = [
        f"# {report['recipe']['name']}",
        "",
        *markdown_table(
            ["", *(STAGES[stage] for stage in present)],
            [(row.label, *row.values) for row in rows(report)],
        ),
        "",
        *(f"- {line}" for line in closing_lines(report)),
        "",
        *(f"![{plot.stem}]({plot.name})" for plot in plots),
        "",
    ]
    if report.get("plan"):
        lines += ["## Layers", "", *_layer_table(report), ""]
    if report.get("bench"):
        lines += ["## Times", "", *_bench_table(report), ""]
    environment = report["environment"]
    lines += ["## How it was made", ""]
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in environment.items()]
    lines += [
        "",
        "The recipe, resolved, is in `recipe.yaml`; every figure is in `report.json`.",
        "",
    ]
    return "\n".join(lines)


def markdown_table(header: list[str], body: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table, first column to the left, the others to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *body)]


def _layer_table(report: Report) -> list[str]:
    final = (report.get("training") or {}).get("ranks") or {}
    body = []
    for layer in report["plan"]["layers"]:
        rank = layer["rank"]
        body.append(
            (
                f"`{layer['name']}`",
                layer["scheme"] or layer["kind"],
                "dense" if rank is None else f"{rank} of {layer['full_rank']}",
                str(final.get(layer["name"], "–")),
                f"{layer['dense_parameters']:,}",
                f"{layer['factored_parameters']:,}",
                layer["reason"] or "",
            )
        )
    header = ["layer", "scheme", "rank", "after training", "dense", "factored", "why dense"]
    return markdown_table(header, body)


def _bench_table(report: Report) -> list[str]:
    body = [
        (
            row["model"],
            row["runtime"],
            row["device"],
            row["precision"],
            str(row["batch"]),
            f"{row['latency_ms_p50']:.3f}",
            f"{row['latency_ms_p95']:.3f}",
            f"{row['throughput_per_s']:,.0f}",
        )
        for row in report["bench"]
    ]
    header = ["model", "runtime", "device", "precision", "batch", "p50 ms", "p95 ms", "images/s"]
    return markdown_table(header, body)


def _latencies(report: Report) -> dict[str, dict[str, float]]:
    """Median milliseconds by place and stage; the compact export stands for the last stage."""
    last = stages(report)[-1]
    found: dict[str, dict[str, float]] = {}
    for row in report.get("bench", []):
        place = f"{row['runtime']} {row['device']} {row['precision']}, batch {row['batch']}"
        stage = "dense" if row["model"] == "dense" else last
        found.setdefault(place, {})[stage] = row["latency_ms_p50"]
    return found


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def _mebibytes(value: float) -> str:
    return f"{value:.2f} MiB"


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f} ms"
