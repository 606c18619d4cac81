"""What a training step spends its time on, and how long the GPU waits meanwhile.

Each network's steps, forward and backward with the optimizer's update, are profiled launched from
Python and, on CUDA, recorded as a graph. Kernels' time is added up: where several run at once, it
is more than the step's.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.command_line import Listed, Script
from benchmarks.contenders import NETWORKS, RULES, Preparation, network_and_images
from benchmarks.study import RESULTS, commit, markdown_table, matching
from converter.files import write_text
from export.doctor import environment
from trainers.capture import WARM_UP
from trainers.device import resolve_device
from trainers.settings import TrainSettings

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks to itself

RANK = "0.5"  # of full, in every layer that is made smaller
STEPS = 5  # from one retraction to the next
SHOWN = 8


@click.command(cls=Script, help=__doc__)
@click.option(
    "--networks",
    type=Listed(click.Choice([*NETWORKS])),
    default="resnet32,vgg13",
    show_default=True,
)
@click.option(
    "--rules",
    multiple=True,
    default=("backprop", "ssa"),
    show_default=True,
    help="those whose name matches this glob; repeatable",
)
@click.option("--launched/--no-launched", default=True, help="also unrecorded, on CUDA")
@click.option("--batch", type=int, help="images to a step  [default: what suits the network]")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32")
@click.option("--device", "name", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file; .md beside it")
def main(networks, rules, launched, batch, precision, name, out) -> None:
    device = resolve_device(name)
    path = out or RESULTS / f"step-profile-{device.type}.json"
    settings = TrainSettings(device=device.type, precision=precision)
    rows = []
    for key in networks:
        dense, x, classes = network_and_images(key, device, batch)
        ready = Preparation(dense, x.to(device), classes, RANK, settings)
        for rule in matching(RULES, rules):
            ways = [*(["launched"] if launched else []), "recorded"]
            for way in ways if device.type == "cuda" else ("launched",):
                contender = ready(rule, record=way == "recorded")
                place = {"network": key, "rule": rule, "images": len(x), "way": way}
                rows.append(place | profiled(contender.learn, contender.update, device))
                print(_line(rows[-1]), flush=True)
    about = {"precision": precision, "rank": RANK, "steps": STEPS, "seed": 0}
    facts = environment(device) | {"commit": commit()}
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"about": about, "environment": facts, "rows": rows}
    write_text(path, json.dumps(result, indent=1) + "\n")
    write_text(path.with_suffix(".md"), "\n".join(_tables(result)))


def profiled(
    learn: Callable[[], object], update: Callable[[], None], device: torch.device
) -> dict[str, Any]:
    """Times of one step in ms, unprofiled and of its operations; on the device, if it is a GPU."""

    def steps() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            learn()
            update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start) / STEPS

    for _ in range(WARM_UP + 1):
        steps()  # as many as there are from one retraction to the next
    wall = min(steps() for _ in range(5))
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as recorded:
        steps()
    events = recorded.key_averages()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA]
    # A graph's kernels belong to no operation.
    operations = [e for e in events if e.device_type == DeviceType.CPU]
    times = {
        e.key: ((e.self_device_time_total if gpu else e.self_cpu_time_total), e.count)
        for e in operations
    }
    largest = sorted(times.items(), key=lambda item: -item[1][0])[:SHOWN]
    return {
        "step_ms": wall,
        "kernels_ms": sum(e.self_device_time_total for e in kernels) / 1e3 / STEPS if gpu else wall,
        "kernels": sum(e.count for e in kernels) / STEPS,
        "operations": [
            {"name": name, "ms": spent / 1e3 / STEPS, "calls": calls / STEPS}
            for name, (spent, calls) in largest
            if spent
        ],
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['network']}, {row['rule']}, {row['way']}: {row['step_ms']:.2f} ms a step, "
        f"{row['kernels']:.0f} kernels of {row['kernels_ms']:.2f} ms"
    )


def _tables(result: dict[str, Any]) -> Iterator[str]:
    facts = result["environment"]
    where = facts.get("gpu") or f"{facts['processor']}, {facts['threads']} thread(s)"
    yield "# What a training step spends its time on\n"
    yield f"{where}, {result['about']['precision']}, torch {facts['torch']}, half rank.\n"
    head = ["network, rule", "images", "step, ms", "kernels' time, ms", "kernels"]
    yield markdown_table(
        head,
        (
            [
                f"{row['network']}, {row['rule']}, {row['way']}",
                str(row["images"]),
                f"{row['step_ms']:.2f}",
                f"{row['kernels_ms']:.2f}",
                f"{row['kernels']:.0f}",
            ]
            for row in result["rows"]
        ),
    )
    for row in result["rows"]:
        if row["operations"] and row["way"] == "launched":
            yield f"## {row['network']}, {row['rule']}: the largest operations of a step\n"
            lines = (
                [f"`{o['name']}`", f"{o['ms']:.2f}", f"{o['calls']:.0f}"] for o in row["operations"]
            )
            yield markdown_table(["", "ms", "calls"], lines)


if __name__ == "__main__":
    main()
