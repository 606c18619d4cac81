"""Inference time, dense against factored: each network at three budgets, side by side.

Every network is factored at two budgets of parameters and one of measured time, and timed against
its dense original, all in compact form: on the CPU with torch and ONNX Runtime, on CUDA (where
there is one) also as a CUDA graph and in fp16. The budget of time is planned on the device that it
is timed on, in torch and for one batch size; the last table says what became of it there.

The weights are random, batch norm's statistics are of random images. They decide from which layers
a budget takes its ranks, but not how long a rank takes. A network that is in the results already is
not timed again unless --again is given.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.command_line import Listed, Script
from benchmarks.study import RESULTS, Row, Study, markdown_table
from converter.convert import convert, plan
from converter.cost import count_macs, count_parameters
from converter.errors import StiefelError
from converter.files import write_text
from converter.models import load, spec_of
from export.bench import BenchSettings, bench
from export.bench_report import BenchRatio, BenchRow
from export.doctor import PROVIDERS, environment, try_provider
from export.onnx import OnnxSettings, export_onnx
from stiefel.plots import draw_bench
from trainers.device import resolve_device

NETWORKS = {
    "resnet18": "torchvision:resnet18",
    "resnet50": "torchvision:resnet50",
    "vgg16_bn": "torchvision:vgg16_bn",
    "vit_b_16": "torchvision:vit_b_16",
    "mobilenet_v2": "torchvision:mobilenet_v2",
    "resnet56": "zoo:resnet56",
}
DENSE, TIMED = "dense", "latency=0.5"
BUDGETS = ("params=0.5", "params=0.25", TIMED)
RUNTIMES = {
    "cpu": ("torch", "onnxruntime"),
    "cuda": ("torch", "torch-cudagraph", "onnxruntime"),
}
PRECISIONS = {"cpu": ("fp32",), "cuda": ("fp32", "fp16")}
# Fifty layers of random weights, cut to a quarter, make much of fp16's rounding.
TOLERANCES = {"fp32": 1e-4, "fp16": 0.5}


@dataclass(frozen=True)
class Scale:
    """How much is timed.

    Attributes:
        networks: of `NETWORKS`.
        timings: for each device, groups of batch sizes and how they are timed.
        planned: for each device, the batch that the budget of time is measured with.
        largest: images are no larger than this.
    """

    networks: tuple[str, ...]
    timings: Mapping[str, tuple[dict[str, Any], ...]]
    planned: Mapping[str, int]
    largest: int


SCALES = {
    "full": Scale(
        networks=tuple(NETWORKS),
        timings={
            "cpu": (
                {"batches": (1, 8), "rounds": 15, "seconds": 1.0, "warmup": 2},
                # A call takes seconds here, so there are few.
                {"batches": (64,), "rounds": 3, "calls": 1, "warmup": 1},
            ),
            "cuda": ({"batches": (1, 8, 64), "rounds": 15, "seconds": 1.0},),
        },
        planned={"cpu": 8, "cuda": 64},
        largest=224,
    ),
    "small": Scale(
        networks=("resnet18", "resnet56"),
        timings={
            device: ({"batches": (1, 4), "rounds": 5, "seconds": 0.3},) for device in RUNTIMES
        },
        planned={"cpu": 4, "cuda": 4},
        largest=64,
    ),
}


@click.command(cls=Script, help=__doc__)
@click.option("--scale", type=click.Choice(list(SCALES)), default="full", show_default=True)
@click.option(
    "--networks",
    type=Listed(click.Choice([*NETWORKS])),
    help=f"of {', '.join(NETWORKS)}  [default: scale's]",
)
@click.option(
    "--devices", type=Listed(), default="auto", show_default=True, help="cpu, cuda or both"
)
@click.option("--again", is_flag=True, help="time anew what is in the results already")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="the JSON file; tables and plots go beside it  [default: results/inference.json]",
)
def main(
    scale: str, networks: tuple[str, ...], devices: str, again: bool, out: Path | None
) -> None:
    """Time what is missing, then write the tables and plots of all there is."""
    out = out or RESULTS / ("inference.json" if scale == "full" else f"inference-{scale}.json")
    names = networks or SCALES[scale].networks
    about = {"study": "inference", "scale": scale, "budgets": list(BUDGETS), "seed": 0}
    study = Study(out, about)
    for device in _devices(devices):
        for name in names:
            asked = {"network": name, "device": device}
            if again:
                study.forget(**asked)
            study.measure(asked, lambda n=name, d=device: time_network(n, d, SCALES[scale]))
            write_text(out.with_suffix(".md"), report(study.rows))
    draw(study.rows, out)


def _devices(names: tuple[str, ...]) -> list[str]:
    if names == ("auto",):
        return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if unknown := set(names) - set(RUNTIMES):
        raise click.BadParameter(f"no device {sorted(unknown)[0]}", param_hint="--devices")
    return [resolve_device(name).type for name in names]


def time_network(name: str, device: str, scale: Scale) -> Row:
    """One network dense and at every budget, on one device."""
    torch.manual_seed(0)
    dense = load(NETWORKS[name])
    channels, *size = spec_of(dense).input.shape
    example = torch.randn(scale.planned[device], channels, *(min(s, scale.largest) for s in size))
    models, plans = _models(dense, example, device)
    for model in models.values():
        settle(model, example)
    runtimes = [r for r in RUNTIMES[device] if r != "onnxruntime" or _onnx_runs(device)]
    rows, ratios, ceilings = [], [], []
    for precision in PRECISIONS[device]:
        with tempfile.TemporaryDirectory() as folder:
            files = {label: Path(folder) / f"{i}.onnx" for i, label in enumerate(models)}
            settings = OnnxSettings(precision=precision, tolerance=TOLERANCES[precision])
            for label, model in models.items():
                export_onnx(model, files[label], example=example, settings=settings)
            for timing in scale.timings[device]:
                options = timing | {
                    "devices": (device,),
                    "runtimes": runtimes,
                    "precisions": (precision,),
                }
                found = bench(files, BenchSettings(**options), modules=models, example=example)
                rows += [row.model_dump() for row in found.rows]
                ratios += [ratio.model_dump() for ratio in found.ratios]
                ceilings += [dict(limit) for limit in found.ceilings]
    return {
        "planned_batch": scale.planned[device],
        "plans": plans,
        "rows": rows,
        "ratios": ratios,
        "ceilings": ceilings,
        "environment": environment(device) | {"input_shape": list(example.shape[1:])},
    }


@torch.no_grad()
def settle(model: nn.Module, example: Tensor) -> None:
    """Give batch norms the statistics of a batch (N, ...); else fp16 has nothing left at the end.

    In place. A new network's statistics are those of no images at all, so that what passes through
    fifty layers fades out or grows beyond measure.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    model(example)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def _models(
    dense: nn.Module, example: Tensor, device: str
) -> tuple[dict[str, nn.Module], dict[str, Row]]:
    """The dense network and what each budget made of it; a budget out of reach says so."""
    models, plans = {DENSE: dense}, {}
    whole = {"parameters": count_parameters(dense), "macs": count_macs(dense, example)}
    for budget in BUDGETS:
        try:
            planned = plan(dense, budget, example=example, device=device)
        except StiefelError as error:
            plans[budget] = {"refused": str(error)}
            continue
        models[budget] = small = convert(dense, planned)
        plans[budget] = {
            "parameters": count_parameters(small) / whole["parameters"],
            "macs": count_macs(small, example) / whole["macs"],
        }
        if planned.factored_latency_ms:
            plans[budget]["latency"] = planned.factored_latency_ms / planned.dense_latency_ms
    return models, plans


def _onnx_runs(device: str) -> bool:
    """Whether ONNX Runtime's provider loads; without it the other runtimes are still of use."""
    why = try_provider(PROVIDERS[device])
    if why is not None:
        click.echo(f"ONNX Runtime is left out on {device}: {why}", err=True)
    return why is None


def report(rows: Iterable[Row]) -> str:
    """A table for each device and precision, and what became of the budgets of time."""
    rows = list(rows)
    text = [
        "# Inference, dense against factored\n\n"
        "Dense: median ms of a batch. Factored: how many times as fast as dense (95 % interval of "
        "the median over rounds); *italic* where that is no more than noise. Below 1 is slower.\n"
    ]
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in rows if row["device"] == device]
        text += [
            f"\n## {_where(here[0])}, {precision}\n\n{_times(here, precision)}"
            for precision in PRECISIONS[device]
        ]
        text.append(f"\n### {TIMED}, planned and timed with torch on {device}\n\n{_kept(here)}")
    return "".join(text)


def _where(row: Row) -> str:
    facts = row["environment"]
    if row["device"] == "cuda":
        return f"{facts['gpu']}, torch {facts['torch']}"
    return f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}"


def _times(rows: Iterable[Row], precision: str) -> str:
    rows = list(rows)
    cells = {(r["runtime"], r["batch"]): 0 for row in rows for r in row["rows"]}
    head = ["network", "budget", "parameters", "MACs"]
    head += [f"{runtime}, {batch}" for runtime, batch in sorted(cells)]
    lines = []
    for row in rows:
        for budget in (DENSE, *row["plans"]):
            made = row["plans"].get(budget, {"parameters": 1.0, "macs": 1.0})
            if "refused" in made:
                lines.append([row["network"], budget, made["refused"], *[""] * (len(head) - 3)])
                continue
            place = {"model": budget, "precision": precision}
            figures = [_cell(row, place | {"runtime": r, "batch": b}) for r, b in sorted(cells)]
            sizes = [f"{made[key]:.0%}" for key in ("parameters", "macs")]
            lines.append([row["network"], budget, *sizes, *figures])
    return markdown_table(head, lines)


def _cell(row: Row, asked: Row) -> str:
    """The dense median in ms, or a speed-up with its interval."""
    if ratio := _found(row["ratios"], asked):
        ratio = BenchRatio(**ratio)
        text = f"{ratio.speedup:.2f}× ({ratio.speedup_low:.2f}–{ratio.speedup_high:.2f})"
        return f"*{text}*" if ratio.within_noise else text
    timed = _found(row["rows"], asked)
    return f"{timed['latency_ms_p50']:.2f} ms" if timed else "–"


def _kept(rows: Iterable[Row]) -> str:
    """Time over dense: asked for, measured while planning, and timed afterwards."""
    lines = []
    for row in rows:
        made, batch = row["plans"][TIMED], row["planned_batch"]
        place = {"model": TIMED, "runtime": "torch", "precision": "fp32", "batch": batch}
        if "refused" in made:
            lines.append([row["network"], str(batch), made["refused"], "", ""])
        elif ratio := _found(row["ratios"], place):
            took = 1 / ratio["speedup"]
            within = abs(took / float(TIMED.partition("=")[2]) - 1) <= 0.1
            lines.append(
                [
                    row["network"],
                    str(batch),
                    f"{made['latency']:.2f}",
                    f"{took:.2f} ({1 / ratio['speedup_high']:.2f}–{1 / ratio['speedup_low']:.2f})",
                    "yes" if within else "no",
                ]
            )
    return markdown_table(("network", "batch", "planned", "timed", "within 10 %"), lines)


def _found(rows: Iterable[Row], asked: Row) -> Row | None:
    return next((row for row in rows if asked.items() <= row.items()), None)


def draw(rows: Iterable[Row], out: Path) -> None:
    """Latency against batch, one picture for each network and device."""
    for row in rows:
        path = out.with_name(f"{out.stem}-{row['network']}-{row['device']}.png")
        draw_bench([BenchRow(**timed) for timed in row["rows"]], path)


if __name__ == "__main__":
    main()
