"""Pictures of a run: accuracy and rank over training, dense against factored, spectra."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed, wherever this runs

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from converter.errors import StiefelError
from converter.files import atomic_path

ENDINGS = (".png", ".svg", ".pdf", ".jpg")  # of pictures
DENSE, FACTORED, MUTED = "#5b6770", "#0f7c8a", "#c9d1d6"
MORE = ("#d1772e", "#8a4f9e", "#3f8f4f", "#b8324f", "#8c7a2b", "#2f4f9e")


def draw_training(report: Mapping[str, Any], path: Path) -> Path:
    """Test accuracy by epoch, pretraining then local training, with ranks below."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7, 5.4), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    offset = 0
    for key, label, colour in (
        ("pretraining", "dense, backpropagation", DENSE),
        ("training", f"factored, {_rule(report)}", FACTORED),
    ):
        records = (report.get(key) or {}).get("records", [])
        epochs = [offset + record["epoch"] for record in records]
        accuracy = [100 * record["test_accuracy"] for record in records]
        top.plot(epochs, accuracy, "o-", color=colour, label=label, markersize=4)
        _plot_ranks(bottom, epochs, [record["ranks"] for record in records], colour)
        offset += len(records)
    if report.get("converted") and report.get("training"):
        level = 100 * report["converted"]["accuracy"]
        top.axhline(level, color=MUTED, linestyle="--", label="converted, before training")
    top.set_ylabel("test accuracy, %")
    top.legend(loc="lower right", frameon=False)
    bottom.set_ylabel("rank, each layer")
    bottom.set_xlabel("epoch")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _save(figure, path)


def draw_comparison(report: Mapping[str, Any], path: Path) -> Path:
    """Each cost of the factored model as a fraction of the dense one's, and both accuracies."""
    final = report.get("trained") or report.get("converted") or report["dense"]
    bars = [
        (label, final[key] / report["dense"][key])
        for label, key in (
            ("parameters", "parameters"),
            ("multiply-adds", "macs"),
            ("file size", "file_size_bytes"),
            ("training memory", "activation_memory_mib"),
        )
        if final.get(key) and report["dense"].get(key)
    ]
    bars += [
        (f"latency, {ratio['runtime']}\nbatch {ratio['batch']}", 1 / ratio["speedup"])
        for ratio in report.get("bench_ratios", [])
    ]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 0.36 * max(8, len(bars)) + 1), width_ratios=(1, 2), layout="constrained"
    )
    stages = [stage for stage in ("dense", "converted", "trained") if report.get(stage)]
    heights = [100 * report[stage]["accuracy"] for stage in stages]
    drawn = left.bar(stages, heights, color=[DENSE, MUTED, FACTORED][: len(stages)])
    left.bar_label(drawn, fmt="%.1f")
    left.set_ylim(0, 108)
    left.set_ylabel("test accuracy, %")
    drawn = right.barh([label for label, _ in bars], [ratio for _, ratio in bars], color=FACTORED)
    right.axvline(1, color=DENSE, linestyle="--")
    beside = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # readable across the line
    right.bar_label(drawn, fmt="%.2f", padding=3, bbox=beside)
    right.set_xlim(0, 1.15 * max([1.0, *(ratio for _, ratio in bars)]))
    right.set_xlabel("factored / dense (1 = dense, less is better)")
    right.invert_yaxis()
    return _save(figure, path)


def draw_diagnostics(looks: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """What a training was like inside: a line for each layer or block, from input to output.

    Args:
        looks: `History.diagnostics`; without any there is no picture, an earlier run's neither.
        path: the picture to write.
    """
    if not looks:
        path.unlink(missing_ok=True)
        return None
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, layout="constrained")
    epochs = [look["epoch"] for look in looks]

    def lines(axis: Axes, label: str, found: Sequence[Mapping[str, float | None]]) -> None:
        names = [name for name, value in found[-1].items() if value is not None]
        colours = plt.get_cmap("viridis")
        for place, name in enumerate(names):
            colour = colours(0.9 * place / max(1, len(names) - 1))
            values = [math.nan if at.get(name) is None else at[name] for at in found]
            axis.plot(epochs, values, "o-", color=colour, label=name, markersize=3)
        axis.set_ylabel(label)
        if names:
            ends = {0, len(names) - 1} if len(names) > 8 else range(len(names))
            handles = axis.get_legend_handles_labels()[0]
            axis.legend(handles=[handles[k] for k in sorted(ends)], frameon=False, fontsize=7)

    def of_layers(key: str) -> list[dict[str, float | None]]:
        return [{n: line.get(key) for n, line in look["layers"].items()} for look in looks]

    (angle, probe), (off, rank) = axes
    lines(angle, "angle to backpropagation, °", of_layers("angle_deg"))
    angle.axhline(90, color=MUTED, linestyle="--")
    lines(probe, "linear probe, test accuracy, %", [_probes(look) for look in looks])
    lines(off, "departure ‖UᵀU − I‖", of_layers("departure"))
    lines(rank, "rank", of_layers("rank"))
    for axis in (off, rank):
        axis.set_xlabel("epoch (0: before training)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _save(figure, path)


def draw_bench(rows: Sequence[Any], path: Path) -> Path:
    """Median latency against batch size, one panel for each runtime, device and precision.

    Args:
        rows: of `export.bench.BenchReport`; the error bars reach to the 95th percentile.
        path: the picture to write.
    """
    places = list(dict.fromkeys((row.runtime, row.device, row.precision) for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    figure, axes = plt.subplots(
        1, len(places), figsize=(4.2 * len(places), 3.6), squeeze=False, layout="constrained"
    )
    for axis, place in zip(axes.flat, places, strict=True):
        for model, colour in zip(models, _colours(len(models)), strict=True):
            here = [r for r in rows if (r.runtime, r.device, r.precision) == place]
            mine = [row for row in here if row.model == model]
            middle = [row.latency_ms_p50 for row in mine]
            above = [max(0.0, row.latency_ms_p95 - row.latency_ms_p50) for row in mine]
            axis.errorbar(
                [row.batch for row in mine],
                middle,
                yerr=[[0] * len(mine), above],
                fmt="o-",
                capsize=3,
                markersize=4,
                color=colour,
                label=model,
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(", ".join(place), fontsize=10)
        axis.set_xlabel("batch")
        batches = sorted({row.batch for row in rows})
        axis.set_xticks(batches, [str(batch) for batch in batches])
    axes.flat[0].set_ylabel("latency, ms (bar: to the 95th percentile)")
    axes.flat[0].legend(frameon=False)
    return _save(figure, path)


def draw_spectra(
    spectra: Mapping[str, Sequence[float]], ranks: Mapping[str, int | None], path: Path
) -> Path:
    """Each layer's singular values, relative to its largest, with the chosen rank marked.

    Raises:
        StiefelError: there are none.
    """
    if not spectra:
        raise StiefelError("no layer can be factored: there are no spectra to draw")
    columns = min(4, len(spectra))
    lines = -(-len(spectra) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3 * columns, 2.2 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(spectra) :]:
        axis.set_visible(False)
    for axis, (name, values) in zip(axes.flat, spectra.items(), strict=False):
        top = max(values[0], 1e-30)
        axis.semilogy(range(1, len(values) + 1), [max(v / top, 1e-8) for v in values], color=DENSE)
        if ranks.get(name):
            axis.axvline(ranks[name], color=FACTORED)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7, which="both")
    figure.supxlabel("singular direction; the line is the chosen rank", fontsize=9)
    figure.supylabel("singular value / largest", fontsize=9)
    return _save(figure, path)


def _probes(look: Mapping[str, Any]) -> dict[str, float]:
    """Each block's best root, in percent."""
    return {
        name: 100 * max(readout["probe_accuracy"] for readout in block["readouts"].values())
        for name, block in look["blocks"].items()
        if block["readouts"]
    }


def _colours(count: int) -> list[Any]:
    """The dense colour, the factored colour, and others for more models than two."""
    return [DENSE, FACTORED, *(MORE[k % len(MORE)] for k in range(count - 2))][:count]


def _rule(report: Mapping[str, Any]) -> str:
    train = report["recipe"].get("train") or {}
    return train.get("rule", {}).get("name", "").upper()


def _plot_ranks(axis: Axes, epochs: list[int], ranks: list[Mapping[str, int]], colour: str) -> None:
    for name in ranks[-1] if ranks else ():
        axis.plot(epochs, [at.get(name) for at in ranks], color=colour, alpha=0.6)


def _save(figure: Figure, path: Path) -> Path:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=140, format=path.suffix.lstrip("."))
    plt.close(figure)
    return path
