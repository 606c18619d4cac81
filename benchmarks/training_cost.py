"""What a training step costs: memory of activations and time, local rules against backpropagation.

Every contender takes whole training steps (forward, backward, AdamW, retraction) on the same random
images, in turn, round by round. Memory is told in three figures. Activations: the tensors that
autograd holds for backward at any one time, exact and the same on every machine. Peak: the most
that the allocator holds in forward and backward, temporaries included, beyond the third figure.
Fixed: weights, gradients and AdamW's moments, of the network and of the rule's read-outs. The first
two grow with the batch, so their ratios hold for any batch; the sweeps show depth and width. On
CUDA a step is timed as the trainer takes it, recorded as a graph where that can be, and launched
kernel by kernel as well.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib
import torch
from torch import Tensor, nn

from benchmarks.command_line import Listed, Script
from benchmarks.contenders import (
    NETWORKS,
    ON_CUDA,
    RULES,
    Contender,
    Preparation,
    network_and_images,
    samples,
)
from benchmarks.study import RESULTS, commit, markdown_table, matching
from converter.files import atomic_path, write_text
from converter.models import load
from converter.zoo import Convolutional
from export.doctor import environment
from trainers.capture import WARM_UP
from trainers.device import resolve_device
from trainers.memory import MIB, SavedActivations, allocator_peak
from trainers.settings import TrainSettings

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks to itself
matplotlib.use("Agg")  # no screen needed

from matplotlib import pyplot as plt

BASE = "backprop"
DEPTHS = (20, 32, 44, 56, 110)
WIDTHS = (16, 32, 64, 128)
SWEPT = ("backprop, dense", "backprop", "dfa, stored", "ssa", "ssa, memory 0.25", "ssa, memory 0")
# With a thousand classes each contender weighs gigabytes, optimizer included.
HEAVY = (
    "backprop, dense",
    "backprop",
    "ssa",
    "ssa, memory 0.25",
    "ssa, memory 0",
    "ssa, sample 4",
    "ssa, sample 4, memory 0.25",
    "ssa, sample 4, memory 0",
    "ssa, linear read-outs",
    "ssa, cut at layers",
    "ssa, two blocks at once",
    "ssa, memory 0.25, two at once",
)


@click.command(cls=Script, help=__doc__)
@click.option(
    "--networks",
    type=Listed(click.Choice([*NETWORKS])),
    default="vgg13,resnet32,smallconv,mobilenetv1,resnet50,vit_b_16",
    show_default=True,
)
@click.option("--rules", multiple=True, help="only those whose name matches this glob; repeatable")
@click.option("--rank", default="0.5", show_default=True, help="as for stiefel convert")
@click.option(
    "--batch", type=int, help="images to a step  [default: what suits network and device]"
)
@click.option("--rounds", default=5, show_default=True, help="timed steps of each contender")
@click.option("--sweeps/--no-sweeps", default=True, show_default=True, help="depth and width too")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32")
@click.option("--device", "name", default="auto", show_default=True)
@click.option("--threads", default=1, show_default=True, help="of torch, on a CPU")
@click.option(
    "--out", type=click.Path(path_type=Path), help="the JSON file; .md and .png beside it"
)
def main(networks, rules, rank, batch, rounds, sweeps, precision, name, threads, out) -> None:
    torch.set_num_threads(threads)
    device = resolve_device(name)
    path = out or RESULTS / f"training-cost-{device.type}.json"
    settings = TrainSettings(device=device.type, precision=precision)
    started, found = time.perf_counter(), {"networks": {}, "depth": {}, "width": {}}

    def measure(part: str, key: str, dense: nn.Module, x: Tensor, classes: int, rules) -> None:
        print(f"{part} {key}, {len(x)} images to a step", flush=True)
        x = x.to(device)
        rows = compare(dense, x, classes, rank, settings, rules, rounds)
        found[part][key] = {"images": len(x), "shape": list(x.shape[1:]), "rows": rows}
        for row in rows:
            print("  " + _line(row, rows), flush=True)

    for key in networks:
        dense, x, classes = network_and_images(key, device, batch)
        suited = matching(RULES if classes < 1000 else HEAVY, rules)
        if device.type == "cpu":
            suited = [rule for rule in suited if rule not in ON_CUDA]
        suited = [rule for rule in suited if samples(rule, len(x))]
        measure("networks", key, dense, x, classes, suited)
    count = batch or (512 if device.type == "cuda" else 64)
    for depth in DEPTHS if sweeps else ():
        torch.manual_seed(0)
        x = torch.randn(count, 3, 32, 32)
        measure("depth", str(depth), load(f"zoo:resnet{depth}"), x, 10, SWEPT)
    for width in WIDTHS if sweeps else ():
        torch.manual_seed(0)
        x = torch.randn(count, 3, 32, 32)
        measure("width", str(width), _plain_stack(width), x, 10, SWEPT)

    about = {"rank": rank, "rounds": rounds, "precision": precision, "seed": 0}
    facts = environment(device) | {"commit": commit()}
    seconds = round(time.perf_counter() - started)
    result = {"about": about, "environment": facts, "seconds": seconds, **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    write_text(path.with_suffix(".md"), "\n".join(_tables(result)))
    if sweeps:
        _draw(result, path.with_suffix(".png"))
    print(f"Wrote {path} and its table after {seconds} s.")


def compare(
    dense: nn.Module,
    x: Tensor,
    classes: int,
    rank: str,
    settings: TrainSettings,
    rules: Sequence[str],
    rounds: int,
) -> list[dict[str, Any]]:
    """Memory of each contender, then their steps timed in turn; one row each."""
    ready = Preparation(dense, x, classes, rank, settings)
    launched = [ready(name, record=False) for name in rules]
    rows = [weigh(contender, x.device) for contender in launched]
    for row in rows:
        if row["rule"] in ON_CUDA:  # the host frees a block before the next begins, the GPU may not
            row |= {"activations_mib": None, "peak_mib": None}
    contenders = launched
    if x.device.type != "cpu":
        contenders = [ready(name, record=True) for name in rules]
    for _ in range(WARM_UP + 1 if contenders is not launched else 0):
        for contender in contenders:
            contender.learn()
            for _ in range(settings.retract_every):
                contender.update()
    for turn in range(rounds):
        for contender in contenders if turn else dict.fromkeys((*contenders, *launched)):
            contender.seconds.append(_round(contender, x.device))
    base = next(c.seconds for c in contenders if c.name == BASE)
    for row, contender, other in zip(rows, contenders, launched, strict=True):
        pairs = zip(contender.seconds, base, strict=True)
        ratios = [sum(mine) / sum(theirs) for mine, theirs in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        row |= {
            "step_ms_p50": 1e3 * statistics.median(map(sum, contender.seconds)),
            "update_ms_p50": 1e3 * statistics.median(update for _, update in contender.seconds),
            "launched_ms_p50": 1e3 * statistics.median(map(sum, other.seconds)),
            "time_ratio": middle,
            "time_ratio_low": low,
            "time_ratio_high": high,
        }
    return rows


def weigh(contender: Contender, device: torch.device) -> dict[str, Any]:
    """Memory of forward and backward, where gradients have their place already."""
    contender.learn()
    with SavedActivations(contender.network, contender.state) as saved:
        contender.learn()
    peak = allocator_peak(contender.learn, device)
    contender.update()
    parts = [[*part.parameters()] for part in (contender.network, contender.state)]
    network, readouts = (sum(p.numel() for p in part) for part in parts)
    return {
        "rule": contender.name,
        "activations_mib": saved.peak_bytes / MIB,
        "peak_mib": peak / MIB,
        "fixed_mib": 4 * 4 * (network + readouts) / MIB,
        "parameters": network,
        "readout_parameters": readouts,
    }


def _plain_stack(width: int) -> nn.Module:
    """Six convolutions in three stages, `width` channels in the first."""
    stages = (width, width, "M", 2 * width, 2 * width, "M", 4 * width, 4 * width, "M")
    return Convolutional(stages, (), 10, 3, 32)


def _round(contender: Contender, device: torch.device) -> tuple[float, float]:
    """Seconds of learning and of updating, of one step."""
    learn, update = contender.learn, contender.update
    if device.type == "cpu":
        return _timed(learn), _timed(update)

    def step() -> None:
        learn()
        update()

    # A GPU is launched ahead of, so what the parts take is known from what they take together.
    learning, whole = (_timed_ahead(work, device) for work in (learn, step))
    return learning, whole - learning


def _timed(work: Callable[[], object]) -> float:
    """Seconds. One thread's own processor time is what it would take on a quiet machine."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def _timed_ahead(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one of five in a row, as in training, where no step waits for the one before."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(5):
        work()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / 5


def _memory(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Activations and peak, each with how many times more the factored backpropagation holds."""
    base = next(r for r in rows if r["rule"] == BASE)
    cells = []
    for key in ("activations_mib", "peak_mib"):
        known = row[key] is not None
        cells += [f"{row[key]:.1f}", f"{base[key] / row[key]:.1f}"] if known else ["–", "–"]
    return cells


def _line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    saved, less, peak, lower = _memory(row, rows)
    return (
        f"{row['rule']:<24} activations {saved:>8} MiB (÷{less:>5})  "
        f"peak {peak:>8} MiB (÷{lower:>4})  "
        f"fixed {row['fixed_mib']:6.0f} MiB  "
        f"step {row['step_ms_p50']:8.1f} ms (×{row['time_ratio']:.2f})"
    )


def _tables(result: dict[str, Any]) -> Iterator[str]:
    facts = result["environment"]
    where = f"{facts['processor']}, {facts['threads']} thread(s)"
    recorded = facts["device"] != "cpu"
    where = facts.get("gpu", where) if recorded else where
    launched = " Launched: not recorded as a CUDA graph, timed in the first round only."
    launched = launched if recorded else ""
    yield "# What a training step costs\n"
    yield (
        f"{where}, {result['about']['precision']}, torch {facts['torch']}, "
        f"rank {result['about']['rank']}. "
        "Activations: held for backward. Peak: of forward and backward, beyond fixed. Fixed: "
        "weights, gradients and AdamW's moments, read-outs included. ÷: how many times less than "
        "backpropagation on the same factored network. ×: time of a step against it, median of the "
        "rounds and quartiles; of it, the update is the optimizer's."
        f"{launched}\n"
    )
    head = [
        "",
        "activations, MiB",
        "÷",
        "peak, MiB",
        "÷",
        "fixed, MiB",
        "step, ms",
        "update, ms",
        "×",
    ]
    head += ["launched, ms"] if recorded else []
    for part in ("networks", "depth", "width"):
        for key, found in result[part].items():
            title = {"networks": key, "depth": f"ResNet-{key}", "width": f"{key} channels wide"}
            shape = "×".join(map(str, found["shape"]))
            yield f"## {title[part]}, {found['images']} images {shape} to a step\n"
            lines = [_cells(row, found["rows"], recorded) for row in found["rows"]]
            yield markdown_table(head, lines)


def _cells(row: dict[str, Any], rows: list[dict[str, Any]], recorded: bool) -> list[str]:
    digits = 1 if recorded else 0
    return [
        row["rule"],
        *_memory(row, rows),
        f"{row['fixed_mib']:.0f}",
        f"{row['step_ms_p50']:.{digits}f}",
        f"{row['update_ms_p50']:.{digits}f}",
        f"{row['time_ratio']:.2f} ({row['time_ratio_low']:.2f}–{row['time_ratio_high']:.2f})",
        *([f"{row['launched_ms_p50']:.1f}"] if recorded else []),
    ]


def _draw(result: dict[str, Any], path: Path) -> None:
    """Memory and time against depth and width, one line a rule."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    shades = ("#c9d1d6", "#5b6770", "#d08c3c", "#0b4f5a", "#0f7c8a", "#8cc9d1")
    colours = dict(zip(SWEPT, shades, strict=True))
    for column, part in enumerate(("depth", "width")):
        places = [int(key) for key in result[part]]
        for rule in SWEPT:
            mine = [
                next(row for row in found["rows"] if row["rule"] == rule)
                for found in result[part].values()
            ]
            for axis, key in zip(axes[:, column], ("activations_mib", "step_ms_p50"), strict=True):
                values = [row[key] for row in mine]
                axis.plot(places, values, "o-", color=colours[rule], label=rule, markersize=4)
        axes[1, column].set_xlabel(
            {"depth": "layers", "width": "channels of the first stage"}[part]
        )
    axes[0, 0].set_title("CIFAR ResNets", fontsize=10)
    axes[0, 1].set_title("six plain convolutions", fontsize=10)
    axes[0, 0].set_ylabel("activations held, MiB")
    axes[1, 0].set_ylabel("step, ms")
    axes[0, 0].legend(frameon=False, loc="upper left", fontsize=9)
    for axis in axes.flat:
        axis.set_ylim(bottom=0)  # after all is drawn: it fixes the top too
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main()
