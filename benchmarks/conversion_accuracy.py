"""What accuracy is left after conversion without labels: step by step, at four sizes.

The public CIFAR-10 ResNets are converted to a share of their convolutions' parameters (the first
convolution and the head stay as they are in size), each step of the recipe added in turn, and
tested on the whole test set. Whatever is calibrated is so on unlabelled training images, drawn
anew for each draw. The recipe's settings were chosen on other training images, never on the test
set. Rows already in the output file are not measured again, so an interrupted run goes on. tensorly
comes with `pip install -e ".[bench]"`, and its row is left out without it.
"""

import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import matplotlib
import torch
from torch import Tensor, nn

from benchmarks.command_line import Listed, Script
from benchmarks.study import RESULTS, Study, markdown_table, mean_sd, real_data
from benchmarks.tensorly_torch import channel_ranks, tucker, tucker_parameters
from converter.calibration import Calibration
from converter.convert import convert, plan
from converter.cost import count_parameters
from converter.files import atomic_path, write_text
from converter.models import load
from converter.rank_plan import RankPlan
from trainers.data import examples, images, load_data

matplotlib.use("Agg")  # no screen needed

from matplotlib import pyplot as plt

NETWORKS = {"resnet56": "resnet56-4bfd9763.th", "resnet32": "resnet32-d509ac18.th"}
OFF = Calibration(
    whitened=False, sequential=False, match_batch_norm=False, sensitivity=0, refine_steps=0
)
# From "plain" on, each has what the one before it has, and one thing more.
STEPS: dict[str, Calibration | None] = {
    "tensorly": None,
    "plain": None,
    "budgeted": None,
    "whitened": OFF.model_copy(update={"whitened": True}),
    "sensitive": OFF.model_copy(update={"whitened": True, "sensitivity": 0.5}),
    "sequential": Calibration(match_batch_norm=False, refine_steps=0),
    "matched": Calibration(refine_steps=0),
    "refined": Calibration(),
}
MEANING = {
    "tensorly": "another toolkit: Tucker, the same fraction of channels everywhere",
    "plain": "the same fraction of full rank everywhere",
    "budgeted": "ranks from one budget on relative energy",
    "whitened": "truncated in the norm of each layer's inputs",
    "sensitive": "budget weighted by the output's sensitivity",
    "sequential": "each layer regressed on what those before it give",
    "matched": "batch norms matched",
    "refined": "features distilled on the same images (the default)",
}
TARGETS = {0.75: 0.8, 0.5: 2.0, 0.33: 4.0, 0.25: 6.5}  # points lost, at most


@click.command(cls=Script, help=__doc__)
@click.option("--cifar", required=True, metavar="DIR", help="CIFAR-10 as train/CLASS, test/CLASS")
@click.option("--data", metavar="DIR", help="where the checkpoints are  [default: $STIEFEL_DATA]")
@click.option("--scale", type=click.Choice(["full", "small"]), default="full", show_default=True)
@click.option("--draws", default=3, show_default=True, help="draws of calibration images")
@click.option("--images", "count", default=500, show_default=True, help="images of each draw")
@click.option("--threads", default=1, show_default=True, help="of torch")
@click.option(
    "--only", type=Listed(click.Choice([*STEPS])), help=f"of {', '.join(STEPS)}  [default: all]"
)
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file; .md and .png beside")
def main(cifar, data, scale, draws, count, threads, only, out) -> None:
    torch.set_num_threads(threads)
    small, folder = scale == "small", real_data(data)
    path = out or RESULTS / f"conversion-accuracy{'-small' if small else ''}.json"
    limit = 1000 if small else None
    study = Study(
        path,
        {
            "scheme": "spatial",
            "calibration_images": count,
            "test_images": limit or 10_000,
            "threads": threads,
            "settings": Calibration().model_dump(),
        },
    )
    bench: Bench | None = None
    wanted = _wanted(only or tuple(STEPS), 1 if small else draws, small)
    for network, fraction, step, draw in wanted:
        asked = {"network": network, "kept": fraction, "step": step, "draw": draw}
        if study.find(**asked) or (step == "tensorly" and find_spec("tltorch") is None):
            continue
        if bench is None or bench.network != network:
            bench = Bench(network, folder / NETWORKS[network], cifar, limit, count)
        study.measure(asked, partial(bench.measure, fraction, step, draw))
        _publish(study)
    _publish(study)
    print(f"Wrote {path} and its table: {len(study.rows)} rows.")


def _wanted(
    names: tuple[str, ...], draws: int, small: bool
) -> Iterator[tuple[str, float, str, int]]:
    """What there is to measure, the most telling first."""
    networks = ("resnet32",) if small else tuple(NETWORKS)
    fractions = (0.5, 0.25) if small else tuple(TARGETS)
    order = sorted(names, key=lambda name: -list(STEPS).index(name))
    for draw in range(draws):
        for network in networks:
            for step in order:
                if draw == 0 or (STEPS[step] is not None):
                    yield from ((network, fraction, step, draw) for fraction in fractions)


class Bench:
    """One network, the test images, and what the dense network says of them."""

    def __init__(self, network: str, checkpoint: Path, cifar: str, limit: int | None, count: int):
        self.network, self.count = network, count
        self.model = load(f"zoo:{network}", checkpoint=checkpoint)
        self.data = load_data(f"imagefolder:{cifar}", input=self.model.stiefel_spec.input)
        self.x, self.labels = examples(self.data.test, limit or len(self.data.test))
        self.said = self._predict(self.model)
        self.convolutions = sum(m.weight.numel() for m in _convolutions(self.model))

    def measure(self, fraction: float, step: str, draw: int) -> dict[str, Any]:
        """Convert and test once."""
        settings = STEPS[step]
        if step == "tensorly":
            small, kept = self._tucker(fraction)
        elif settings is None:
            made = self._uniform(fraction) if step == "plain" else self._budgeted(fraction)
            small, kept = convert(self.model, made), self._kept(made)
        else:
            x = images(self.data.train, self.count, seed=draw)
            made = self._budgeted(fraction, x, settings)
            small = convert(self.model, made, calibration=x, settings=settings)
            kept = self._kept(made)
        said = self._predict(small)
        dense = float((self.said == self.labels).double().mean())
        accuracy = float((said == self.labels).double().mean())
        return {
            "accuracy": accuracy,
            "dense_accuracy": dense,
            "points_lost": 100 * (dense - accuracy),
            "agreement": float((said == self.said).double().mean()),
            "convolution_parameters_kept": kept,
        }

    def _budgeted(
        self, fraction: float, x: Tensor | None = None, settings: Calibration | None = None
    ) -> RankPlan:
        whole = count_parameters(self.model)
        budget = (whole - (1 - fraction) * self.convolutions) / whole
        return plan(
            self.model,
            f"params={budget}",
            calibration=x,
            settings=settings,
            layers={"linear": "keep"},
        )

    def _uniform(self, fraction: float) -> RankPlan:
        """The fraction of full rank that comes nearest to the parameters wanted."""

        def made(rank: float) -> RankPlan:
            return plan(self.model, rank, layers={"linear": "keep"})

        return made(_bisect(lambda rank: self._kept(made(rank)), fraction))

    def _tucker(self, fraction: float) -> tuple[nn.Module, float]:
        """By tensorly-torch, kernels left whole; and the share of the parameters that it keeps."""
        small = copy.deepcopy(self.model)
        layers = [(n, m) for n, m in small.named_modules() if isinstance(m, nn.Conv2d)]
        (_, first), *others = layers

        def kept(rank: float) -> float:
            parts = sum(tucker_parameters(m, channel_ranks(m, rank)) for _, m in others)
            return (first.weight.numel() + parts) / self.convolutions

        rank = _bisect(kept, fraction)
        for name, module in others:
            small.set_submodule(name, tucker(module, channel_ranks(module, rank)))
        return small, kept(rank)

    def _kept(self, made: RankPlan) -> float:
        saved = made.dense_parameters - made.factored_parameters
        return 1 - saved / self.convolutions

    @torch.inference_mode()
    def _predict(self, model: nn.Module) -> Tensor:
        model.eval()
        return torch.cat([model(x).argmax(1) for x in self.x.split(250)])


def _bisect(kept: Callable[[float], float], wanted: float) -> float:
    """The largest fraction of full rank, to a thousandth, that keeps no more than is wanted."""
    low, high = 0.01, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) < wanted else (low, middle)
    return low


def _convolutions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def _publish(study: Study) -> None:
    write_text(study.path.with_suffix(".md"), "\n".join(_tables(study)) + "\n")
    _draw(study, study.path.with_suffix(".png"))


def _lost(study: Study, network: str, step: str, fraction: float) -> list[float]:
    return [row["points_lost"] for row in study.find(network=network, step=step, kept=fraction)]


def _tables(study: Study) -> Iterator[str]:
    yield "# Accuracy after conversion, without labels"
    yield ""
    yield (
        "Percentage points lost against the dense network on the CIFAR-10 (JPEG) test set "
        f"({study.about['test_images']} images), by the share of the convolutions' parameters "
        f"kept; spatial scheme; calibration on {study.about['calibration_images']} unlabelled "
        "training images. Mean ± standard deviation over draws of these; (one) is one draw, or a "
        "step that needs no images. – was not measured."
    )
    for network in NETWORKS:
        mine = study.find(network=network)
        if not mine:
            continue
        yield from ("", f"## {network}, dense {100 * mine[0]['dense_accuracy']:.2f} %", "")
        head = ["step", *(f"{f:.0%}" for f in TARGETS), "what it adds"]
        lines = [
            [step, *(mean_sd(_lost(study, network, step, f)) for f in TARGETS), meaning]
            for step, meaning in MEANING.items()
        ]
        lines.append(["*aim*", *(str(t) for t in TARGETS.values()), "at most"])
        yield markdown_table(head, lines)
        if spent := [row["seconds"] for row in mine if row["step"] == "refined"]:
            seconds = statistics.median(spent)
            yield (
                f"Refined conversion and its test took {seconds:.0f} s (median, "
                f"{study.about['threads']} thread, on a machine shared with other work)."
            )


def _draw(study: Study, path: Path) -> None:
    networks = [network for network in NETWORKS if study.find(network=network)]
    if not networks:
        return
    figure, axes = plt.subplots(1, len(networks), figsize=(5.5 * len(networks), 4), squeeze=False)
    for axis, network in zip(axes[0], networks, strict=True):
        for step in STEPS:
            lost = {f: found for f in TARGETS if (found := _lost(study, network, step, f))}
            means = [statistics.fmean(found) for found in lost.values()]
            spread = [statistics.stdev(f) if len(f) > 1 else 0.0 for f in lost.values()]
            if lost:
                axis.errorbar(list(lost), means, yerr=spread, marker="o", label=step)
        axis.plot(list(TARGETS), list(TARGETS.values()), "k_", markersize=12, label="aim")
        axis.set(title=network, xlabel="convolution parameters kept")
        axis.set_yscale("symlog", linthresh=5)  # a loss may be below 0
        axis.set_xticks(list(TARGETS), [f"{f:.0%}" for f in TARGETS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("points of accuracy lost")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main()
