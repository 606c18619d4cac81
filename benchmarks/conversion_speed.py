"""How long a plain conversion takes, against full SVDs and tensorly-torch in the same run.

Networks are untrained (the time hardly depends on the weights): VGG-16 at a quarter of full rank,
ResNet-50 at half its parameters, ResNet-18 and ViT-B/16 at four sizes, each layer at the rank and
scheme that the plan gives it. The full SVD is `torch.linalg.svd` of the same matrices.
tensorly-torch factors the same layers by Tucker, each to the same share of its parameters,
otherwise as it does by default. Single matrices have singular values that fall as in trained
layers; there tensorly's partial SVD, the one that its decompositions use, stands beside. What
passes `--limit` is stopped, and said to be. Rows already in the output file are not measured again.
tensorly comes with `pip install -e ".[bench]"`.
"""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.command_line import Script
from benchmarks.study import RESULTS, Study, markdown_table
from benchmarks.tensorly_torch import tucker
from converter.convert import convert, plan
from converter.cost import count_parameters
from converter.decompose import decompose
from converter.files import write_text
from converter.layers import find_layers, prepared
from converter.models import load
from converter.rank_plan import LayerPlan

TARGETS = {"vgg16": 60.0, "resnet50": 30.0}  # seconds on two cores
SHARES = (0.75, 0.5, 0.33, 0.25)
NETWORKS = {
    "full": [("vgg16", "0.25"), ("resnet50", "params=0.5")]
    + [(name, f"params={kept}") for name in ("resnet18", "vit_b_16") for kept in SHARES],
    "small": [("resnet18", "params=0.5")],
}
MATRICES = {
    "full": [(4096, 11008, 1024)],
    "small": [(1024, 4608, 256), (1024, 4608, 64)],
}
Facts = dict[str, float]
METHODS = ("ours", "torch.linalg.svd", "tensorly")


@click.command(cls=Script, help=__doc__)
@click.option("--scale", type=click.Choice(["full", "small"]), default="full", show_default=True)
@click.option("--threads", default=2, show_default=True, help="of torch")
@click.option("--repeats", default=3, show_default=True, help="of ours; the least is reported")
@click.option("--limit", default=900.0, show_default=True, help="seconds for each measurement")
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file; .md beside it")
def main(scale: str, threads: int, repeats: int, limit: float, out: Path | None) -> None:
    torch.set_num_threads(threads)
    suffix = "" if scale == "full" else f"-{scale}"
    path = out or RESULTS / f"conversion-speed{suffix}.json"
    study = Study(path, {"threads": threads, "repeats": repeats, "limit_s": limit, "seed": 0})
    jobs = [*NETWORKS[scale], *MATRICES[scale]]
    for job in jobs:
        for method in METHODS:
            asked = {"job": _named(job), "method": method}
            times = repeats if method == "ours" else 1
            study.measure(asked, lambda j=job, m=method, n=times: _limited(j, m, n, threads, limit))
    table = _table(study, [_named(job) for job in jobs])
    write_text(path.with_suffix(".md"), table)
    click.echo(f"\n{table}")


def _named(job: tuple) -> str:
    if len(job) == 2:
        return f"{job[0]} at {job[1]}"
    return f"{job[0]}×{job[1]} to rank {job[2]}"


def _limited(job: tuple, method: str, times: int, threads: int, limit: float) -> dict[str, Any]:
    """Run a measurement in a process of its own, which can be stopped."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=_work, args=(answers, job, method, times, threads))
    worker.start()
    start = time.monotonic()
    while answers.empty() and worker.is_alive() and time.monotonic() - start < limit:
        worker.join(0.1)
    worker.join(1)
    if not answers.empty():
        found = answers.get()
    elif worker.is_alive():
        found = {"failed": f"stopped after {limit:.0f} s"}
    else:
        found = {"failed": f"ended with status {worker.exitcode}"}
    worker.kill()
    return found


def _work(answers: Any, job: tuple, method: str, times: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        measured = (_network if len(job) == 2 else _matrix)(job, method)
        seconds, facts = min((_timed(*measured) for _ in range(times)), key=lambda pair: pair[0])
        answers.put({"took_s": seconds, **facts})
    except ImportError as error:
        answers.put({"failed": f"{error.name} is not installed"})


def _timed(run: Callable[[], Any], check: Callable[[Any], Facts]) -> tuple[float, Facts]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, check(result)


def _network(job: tuple, method: str) -> tuple[Callable, Callable]:
    """What to time, and how much of the network is left of its result."""
    name, policy = job
    model = load(f"torchvision:{name}")
    whole = count_parameters(model)

    def kept(parameters: int) -> Facts:
        return {"parameters_kept": parameters / whole}

    if method == "ours":
        return lambda: convert(model, plan(model, policy)), lambda made: kept(
            count_parameters(made)
        )
    made = plan(model, policy)
    layers = {layer.name: layer for layer in find_layers(prepared(model, share=True))}
    chosen = [(layers[entry.name], entry) for entry in made.factored]
    if method == "tensorly":
        weights = sum(layer.module.weight.numel() for layer, _ in chosen)
        return (
            lambda: [tucker(layer.module, _share(layer.module, entry)) for layer, entry in chosen],
            lambda found: kept(whole - weights + sum(_weights(module) for module in found)),
        )
    matrices = [layer.matrix(entry.scheme) for layer, entry in chosen]
    return (
        lambda: [torch.linalg.svd(W, full_matrices=False).S[0] for W in matrices],
        lambda _: kept(made.factored_parameters),
    )


def _share(module: nn.Module, entry: LayerPlan) -> float:
    """What share of the layer's weight its factors have."""
    return (entry.factored_parameters - entry.bias_parameters) / module.weight.numel()


def _weights(module: nn.Module) -> int:
    """Parameters of a layer but its bias."""
    return sum(p.numel() for name, p in module.named_parameters() if name != "bias")


def _matrix(job: tuple, method: str) -> tuple[Callable, Callable]:
    rows, columns, rank = job
    W = torch.randn(rows, columns) * torch.arange(1, columns + 1) ** -0.5
    norm = W.norm()

    def error(factors: tuple[Tensor, Tensor, Tensor]) -> Facts:
        U, S, Vh = (factors[0][:, :rank], factors[1][:rank], factors[2][:rank])
        return {"relative_error": float((W - (U * S) @ Vh).norm() / norm)}

    if method == "ours":

        def ours() -> tuple[Tensor, Tensor, Tensor]:
            U, S, V = decompose(W, rank)
            return U, S, V.mT

        return ours, error
    if method == "tensorly":
        import tensorly
        from tensorly.tenalg import svd_interface

        tensorly.set_backend("pytorch")
        return lambda: svd_interface(W, n_eigenvecs=rank), error
    return lambda: torch.linalg.svd(W, full_matrices=False), error


def _table(study: Study, jobs: list[str]) -> str:
    head = ["job", "ours", "torch.linalg.svd", "tensorly", "error, ours over best"]
    head += ["parameters kept, ours; tensorly", "asked"]
    lines = []
    for job in jobs:
        rows = {row["method"]: row for row in study.find(job=job)}
        own, best = rows["ours"], rows["torch.linalg.svd"]
        if "failed" in own:
            lines.append([job, own["failed"], *["–"] * (len(head) - 2)])
            continue
        cells = [job, f"{own['took_s']:.2f} s"]
        for method in METHODS[1:]:
            took = rows[method].get("took_s")
            ratio = "" if took is None else f"{took:.2f} s, {took / own['took_s']:.1f}×"
            cells.append(ratio or rows[method]["failed"])
        errors = own.get("relative_error"), best.get("relative_error")
        cells.append(f"{errors[0] / errors[1] - 1:+.2%}" if all(errors) else "–")
        kept = [rows[method].get("parameters_kept") for method in ("ours", "tensorly")]
        cells.append("; ".join("–" if k is None else f"{k:.1%}" for k in kept) if kept[0] else "–")
        target = TARGETS.get(job.split()[0])
        cells.append("–" if target is None else f"under {target:.0f} s")
        lines.append(cells)
    return (
        "# Speed of conversion\n\n"
        f"CPU, {study.about['threads']} threads; ×: how many times as long as ours.\n\n"
        + markdown_table(head, lines)
    )


if __name__ == "__main__":
    main()
