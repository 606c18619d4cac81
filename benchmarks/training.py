"""From scratch on CIFAR-10: local rules against backpropagation, on the same networks and images.

`--scale small` takes some eleven minutes on two idle CPU cores; `--scale full` is for a GPU. Rates
are those that `--select` found best on training images held back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click
import matplotlib
import torch
from torch import nn

from benchmarks.command_line import Listed, Script
from benchmarks.study import RESULTS, Study, completed, held_back, markdown_table, matching, mean_sd
from converter.convert import convert, plan
from converter.cost import count_parameters
from converter.factors import factored_layers
from converter.files import atomic_path, write_text
from converter.layers import find_layers
from converter.models import load
from converter.specs import spec_of
from trainers.data import Data, load_data
from trainers.evaluate import evaluate
from trainers.memory import activation_memory_mib
from trainers.rank_schedule import RankSchedule
from trainers.rules import BP, DFA, SSA, RuleSettings
from trainers.settings import TrainSettings
from trainers.trainer import train_local

matplotlib.use("Agg")  # no screen needed

from matplotlib import pyplot as plt

MEMORY_BATCH = 64
RATES = (2e-3, 5e-3, 1e-2)  # tried by --select
LOOKS = 500  # test images to look at after each epoch; accuracy is of all of them, at the end


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        rule: how the network is trained.
        rank: fraction of full rank; None leaves the network dense.
        lr: the best of `RATES`, as `--select` found.
        lr_of: the same for networks where it was another (ResNet-32's is ResNet-20's).
        settings: of the training, where they are not the defaults.
    """

    rule: RuleSettings
    rank: float | None = 0.5
    lr: float = 5e-3
    lr_of: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Attributes:
        networks: names of the zoo's, or `NAME*WIDTH` with so many times the channels.
        images: for training; None: all there are.
        epochs: over these.
        held_back: training images that `--select` tests on instead of the test images.
    """

    networks: tuple[str, ...]
    images: int | None
    epochs: int
    held_back: int = 5000


SCALES = {
    "tiny": Scale(("smallconv",), 256, 2, held_back=100),
    "small": Scale(("smallconv",), 3000, 4),
    "short": Scale(("smallconv",), 6000, 5),  # the ablation's
    "medium": Scale(("smallconv", "vgg8*0.5", "resnet32"), 6000, 10),
    "full": Scale(("smallconv", "vgg13", "resnet32", "mobilenetv1"), None, 100),
}
NARROW = {"readout_layers": 2, "readout_width": 32}
TABLE = {
    "backpropagation, dense": Method(BP(), None, lr_of={"mobilenetv1*0.5": 1e-2}),
    "backpropagation, factored": Method(BP(), lr_of={"mobilenetv1*0.5": 1e-2}),
    # Feedback of the output's error goes to every unit, as published.
    "DFA, dense random feedback": Method(DFA(boundaries="units"), None, lr=2e-3),
    "SSA, global error": Method(
        SSA(error="global", boundaries="units"),
        lr=2e-3,
        lr_of={"smallconv": 5e-3, "resnet20": 1e-2, "resnet32": 1e-2},
    ),
    # On MobileNetV1 2e-2 was tried too, for both.
    "SSA, layer-wise": Method(SSA(), lr_of={"mobilenetv1*0.5": 2e-2}),
    "SSA, layer-wise, memory 0.5": Method(SSA(memory=0.5)),
    "SSA, layer-wise, memory 0.25": Method(SSA(memory=0.25)),
    "SSA, layer-wise, pool 2": Method(SSA(pool=2)),
    "SSA, layer-wise, sample 4": Method(SSA(sample=4)),
    "SSA, layer-wise, sample 4, memory 0.25": Method(SSA(sample=4, memory=0.25)),
    "SSA, layer-wise, linear read-outs": Method(SSA(readout_layers=0)),
    "SSA, layer-wise, two convolutions": Method(SSA(readout_layers=2)),
    "SSA, layer-wise, two convolutions, memory 0.5": Method(SSA(readout_layers=2, memory=0.5)),
    "SSA, layer-wise, two convolutions, memory 0.25": Method(SSA(readout_layers=2, memory=0.25)),
    "SSA, layer-wise, two convolutions 32 wide, memory 0.5": Method(SSA(**NARROW, memory=0.5)),
    "SSA, layer-wise, two convolutions 32 wide, memory 0.25": Method(SSA(**NARROW, memory=0.25)),
    "SSA, layer-wise, two convolutions 32 wide, memory 0": Method(SSA(**NARROW, memory=0)),
    "SSA, layer-wise, rank falling": Method(SSA(), settings={"ranks": RankSchedule(final="0.25")}),
}
# One change at a time to the defaults, «SSA, layer-wise» above.
ABLATION = {
    "cross-entropy 0": Method(SSA(cross_entropy=0.0)),
    "similarity 0": Method(SSA(similarity=0.0)),
    "similarity 4": Method(SSA(similarity=4.0)),
    "alignment α 0.1": Method(SSA(alpha=0.1)),
    "orthogonality β 0.01": Method(SSA(beta=0.01)),
    "cosine 0.1": Method(SSA(cosine=0.1)),
    "Hoyer 0.001": Method(SSA(hoyer=0.001)),
    "feedback fixed": Method(SSA(feedback="fixed")),
    "feedback calibrated": Method(SSA(feedback="calibrated")),
    "global, Kolen–Pollack": Method(
        SSA(error="global", feedback="kolen-pollack", boundaries="units"), lr=2e-3
    ),
    "pool 1": Method(SSA(pool=1)),
    "pool 2": TABLE["SSA, layer-wise, pool 2"],
    "memory 0.25": TABLE["SSA, layer-wise, memory 0.25"],
    "a unit to a block": Method(SSA(boundaries="units")),
    "2 layers to a block": Method(SSA(layers_per_block=2)),
    "linear read-outs": TABLE["SSA, layer-wise, linear read-outs"],
    "linear read-outs, 2 layers to a block": Method(SSA(readout_layers=0, layers_per_block=2)),
    "two hidden layers": TABLE["SSA, layer-wise, two convolutions"],
    "hidden layers 32 wide": Method(SSA(readout_width=32)),
    "rank 0.75": Method(SSA(), rank=0.75),
    "rank 0.25 from the start": Method(SSA(), rank=0.25),
    "retraction QR": Method(SSA(), settings={"retraction": "qr"}),
    "retraction polar": Method(SSA(), settings={"retraction": "polar"}),
    "retraction every step": Method(SSA(), settings={"retract_every": 1}),
    "no retraction": Method(SSA(), settings={"retract_every": 0}),
    "SGD, rate 0.05": Method(SSA(), lr=0.05, settings={"optimizer": "sgd"}),
    "rank falling to 0.25": TABLE["SSA, layer-wise, rank falling"],
}


@click.command(cls=Script, help=__doc__)
@click.option(
    "--study", "kind", type=click.Choice(["comparison", "ablation"]), default="comparison"
)
@click.option("--scale", type=click.Choice([*SCALES]), default="small", show_default=True)
@click.option("--networks", type=Listed(), help="of the zoo, or NAME*WIDTH  [default: scale's]")
@click.option("--methods", multiple=True, help="only rows whose name matches this glob; repeatable")
@click.option("--epochs", type=int, help="passes over the images  [default: scale's]")
@click.option("--batch", default=128, show_default=True, help="images to a step")
@click.option("--seeds", default=3, show_default=True)
@click.option("--select", is_flag=True, help="choose rates on held-back training images")
@click.option("--lr", "rates", type=float, multiple=True, help="not each method's own rate")
@click.option(
    "--data", required=True, help="cifar10:DIR, imagefolder:DIR, cifar100:DIR, fake:3x32x32 …"
)
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--jobs", default=1, show_default=True, help="trainings at a time")
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file of the rows")
def main(
    kind,
    scale,
    networks,
    methods,
    epochs,
    batch,
    seeds,
    select,
    rates,
    data,
    device,
    precision,
    jobs,
    out,
) -> None:
    size = replace(SCALES[scale], epochs=epochs or SCALES[scale].epochs)
    name = f"training-{kind}-{scale}" + ("-selection" if select else "")
    about = {
        "study": name,
        "data": data.partition(":")[0],
        "images": size.images,
        "epochs": size.epochs,
        "batch_size": batch,
        "optimizer": "adamw",
        "precision": precision,
    }
    study = Study(out or RESULTS / f"{name}.json", about, device)
    rows = TABLE if kind == "comparison" else {"defaults": TABLE["SSA, layer-wise"], **ABLATION}
    asked_for = matching(rows, methods)
    tasks = []
    for seed in range(1 if select else seeds):
        for network in networks or size.networks:
            for label in asked_for:
                method = rows[label]
                own = RATES if select else (method.lr_of.get(network, method.lr),)
                for lr in rates or own:
                    plain = {"batch_size": batch, "precision": precision, "lr": lr}
                    plain |= {"epochs": size.epochs, "seed": seed, "device": device}
                    settings = TrainSettings(**plain | method.settings)
                    asked = {"network": network, "method": label, "lr": lr, "seed": seed}
                    rest = (method, settings, size, data, select)
                    tasks.append((asked, partial(_trained, network, *rest)))
    study.measure_all(tasks, jobs)
    table = _table(study)
    print(table)
    write_text(study.path.with_suffix(".md"), table)
    if not select:
        _draw(study, "defaults" if kind == "ablation" else "backpropagation, factored")


def _trained(
    network: str, method: Method, settings: TrainSettings, size: Scale, source: str, select: bool
) -> dict[str, float]:
    """Train one network from its seed; its accuracy, and what it cost."""
    torch.manual_seed(settings.seed)
    name, _, width = network.partition("*")
    model = load(f"zoo:{name}", args={"width": float(width)} if width else {})
    if method.rank is not None:
        model = factored(model, method.rank)
    data = _data(source, model, size, select)
    batch = torch.randn(MEMORY_BATCH, *spec_of(model).input.shape)
    memory = activation_memory_mib(model, method.rule, batch, num_classes=len(data.classes))
    glance = replace(data, test=data.test.limited(LOOKS, seed=0))
    history = completed(train_local(model, glance, rule=method.rule, settings=settings))
    ranks = [layer.rank / layer.full_rank for layer in factored_layers(model).values()]
    rest = {"device": settings.device, "precision": settings.precision}
    return {
        "accuracy": 100 * evaluate(model, data.test, **rest).accuracy,
        "train_accuracy": 100 * history.records[-1]["train_accuracy"],
        "parameters": count_parameters(model),
        "activation_memory_mib": memory,
        "rank": sum(ranks) / len(ranks) if ranks else 1.0,
        "images_per_s": history.records[-1]["images_per_s"],
    }


def factored(model: nn.Module, rank: float) -> nn.Module:
    """Every layer at this fraction of full rank, whether or not that saves anything.

    Not the first, which sees three channels, and not the output's: half of ten directions cannot
    tell ten classes apart, and cost backpropagation and local rules alike four points and more.
    """
    names = [layer.name for layer in find_layers(model)]
    layers = {"*": {"rank": rank}, names[0]: "keep", names[-1]: "keep"}
    return convert(model, plan(model, rank, scheme="spatial", layers=layers))


def _data(source: str, model: nn.Module, size: Scale, select: bool) -> Data:
    """The images; with `select`, tested on training images that are not trained on."""
    options = {"input": spec_of(model).input, "seed": 1}
    if not select:
        return load_data(source, limit_train=size.images, **options)
    images = size.images or 45_000
    options["limit_train"] = images + size.held_back
    data = load_data(source, **options)
    return held_back(data, load_data(source, augment=False, **options), images)


def _table(study: Study) -> str:
    """One line a network and method, in the order measured."""
    head = ["network, method", "accuracy, %", "trained parameters", "rank, of full"]
    head += [f"activations, MiB (batch {MEMORY_BATCH})", "rate"]
    keys = dict.fromkeys((row["network"], row["method"], row["lr"]) for row in study.rows)
    lines = []
    for network, method, lr in keys:
        rows = study.find(network=network, method=method, lr=lr)
        lines.append(
            [
                f"{network}, {method}",
                mean_sd([row["accuracy"] for row in rows]),
                f"{rows[0]['parameters']:,}",
                f"{rows[0]['rank']:.2f}",
                f"{rows[0]['activation_memory_mib']:.1f}",
                f"{lr:g}",
            ]
        )
    return markdown_table(head, lines)


def _draw(study: Study, base: str) -> None:
    """Accuracy of each method, one panel a network, with a line where `base` is."""
    networks = list(dict.fromkeys(row["network"] for row in study.rows))
    methods = list(dict.fromkeys(row["method"] for row in study.rows))[::-1]
    size = (2.5 + 3 * len(networks), 1.2 + 0.24 * len(methods))
    figure, axes = plt.subplots(1, len(networks), figsize=size, sharey=True, squeeze=False)
    for axis, network in zip(axes[0], networks, strict=True):
        for place, method in enumerate(methods):
            found = [row["accuracy"] for row in study.find(network=network, method=method)]
            if not found:
                continue
            mean, spread = fmean(found), stdev(found) if len(found) > 1 else 0.0
            axis.errorbar(mean, place, xerr=spread, fmt="o", color="#0f7c8a", markersize=5)
            if method == base:
                axis.axvline(mean, color="#5b6770", linewidth=0.8, linestyle="--")
        axis.set(title=network, xlabel="accuracy, %")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(methods)), methods)
    figure.tight_layout()
    with atomic_path(study.path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main()
