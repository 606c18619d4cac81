"""From scratch on CIFAR-10: local rules against backpropagation, on the same networks and images.

`--scale small` takes some fifteen minutes on two idle CPU cores; `--scale full` is for a GPU. Rates
are those that `--select` found best on training images held back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks.study import RESULTS, Study, held_back, markdown_table, mean_sd
from converter.convert import convert, plan
from converter.cost import count_parameters
from converter.factors import factored_layers
from converter.files import write_text
from converter.models import load
from converter.specs import spec_of
from trainers.data import Data, load_data
from trainers.memory import activation_memory_mib
from trainers.rank_schedule import RankSchedule
from trainers.rules import BP, DFA, SSA, RuleSettings
from trainers.settings import TrainSettings
from trainers.trainer import train_local

MEMORY_BATCH = 64
RATES = (2e-3, 1e-3, 5e-3)  # tried by --select; the first is used


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        rule: how the network is trained.
        rank: fraction of full rank; None leaves the network dense.
        settings: of the training, where they are not the defaults.
    """

    rule: RuleSettings
    rank: float | None = 0.5
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """How much is trained."""

    networks: tuple[str, ...]
    images: int | None
    test_images: int | None
    epochs: int


SCALES = {
    "tiny": Scale(("smallconv",), 256, 100, 2),
    "small": Scale(("smallconv",), 6000, 2000, 5),
    "full": Scale(("smallconv", "vgg13", "resnet32", "mobilenetv1"), None, None, 100),
}
TABLE = {
    "backpropagation, dense": Method(BP(), None),
    "backpropagation, factored": Method(BP()),
    "DFA, dense random feedback": Method(DFA(), None),
    "SSA, global error": Method(SSA(error="global")),
    "SSA, layer-wise": Method(SSA()),
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
    "global, Kolen–Pollack": Method(SSA(error="global", feedback="kolen-pollack")),
    "pool 1": Method(SSA(pool=1)),
    "pool 2": Method(SSA(pool=2)),
    "2 layers to a block": Method(SSA(layers_per_block=2)),
    "rank 0.75": Method(SSA(), rank=0.75),
    "rank 0.25 from the start": Method(SSA(), rank=0.25),
    "retraction QR": Method(SSA(), settings={"retraction": "qr"}),
    "retraction polar": Method(SSA(), settings={"retraction": "polar"}),
    "retraction every step": Method(SSA(), settings={"retract_every": 1}),
    "no retraction": Method(SSA(), settings={"retract_every": 0}),
    "SGD, rate 0.1": Method(SSA(), settings={"optimizer": "sgd", "lr": 0.1}),
    "rank falling to 0.25": TABLE["SSA, layer-wise, rank falling"],
}


@click.command(help=__doc__)
@click.option(
    "--study", "kind", type=click.Choice(["comparison", "ablation"]), default="comparison"
)
@click.option("--scale", type=click.Choice([*SCALES]), default="small", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--select", is_flag=True, help="choose rates on held-back training images")
@click.option("--data", required=True, help="cifar10:DIR, imagefolder:DIR, cifar100:DIR, digits …")
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file of the rows")
def main(kind, scale, seeds, select, data, device, precision, out) -> None:
    size = SCALES[scale]
    name = f"training-{kind}-{scale}" + ("-selection" if select else "")
    about = {
        "study": name,
        "data": data.partition(":")[0],
        "images": size.images,
        "epochs": size.epochs,
        "batch_size": 128,
        "optimizer": "adamw",
        "precision": precision,
    }
    study = Study(out or RESULTS / f"{name}.json", about)
    methods = TABLE if kind == "comparison" else {"defaults": TABLE["SSA, layer-wise"], **ABLATION}
    for seed in range(1 if select else seeds):
        for network in size.networks:
            for label, method in methods.items():
                own = method.settings
                for lr in RATES if select else (own.get("lr", RATES[0]),):
                    plain = {"batch_size": 128, "precision": precision, **own, "lr": lr}
                    settings = TrainSettings(epochs=size.epochs, seed=seed, device=device, **plain)
                    asked = {"network": network, "method": label, "lr": lr, "seed": seed}
                    study.measure(
                        asked, partial(_trained, network, method, settings, size, data, select)
                    )
    table = _table(study)
    print(table)
    write_text(study.path.with_suffix(".md"), table)


def _trained(
    network: str, method: Method, settings: TrainSettings, size: Scale, source: str, select: bool
) -> dict[str, float]:
    """Train one network from its seed; its accuracy, and what it cost."""
    torch.manual_seed(settings.seed)
    model = load(f"zoo:{network}")
    if method.rank is not None:
        model = convert(model, plan(model, method.rank, scheme="spatial"))
    data = _data(source, model, size, select)
    batch = torch.randn(MEMORY_BATCH, *spec_of(model).input.shape)
    memory = activation_memory_mib(model, method.rule, batch, num_classes=len(data.classes))
    history = train_local(model, data, rule=method.rule, settings=settings)
    ranks = [layer.rank / layer.full_rank for layer in factored_layers(model).values()]
    return {
        "accuracy": 100 * history.records[-1]["test_accuracy"],
        "train_accuracy": 100 * history.records[-1]["train_accuracy"],
        "parameters": count_parameters(model),
        "activation_memory_mib": memory,
        "rank": sum(ranks) / len(ranks) if ranks else 1.0,
        "images_per_s": history.records[-1]["images_per_s"],
    }


def _data(source: str, model: nn.Module, size: Scale, select: bool) -> Data:
    """The images; with `select`, tested on training images that are not trained on."""
    options = {"input": spec_of(model).input, "limit_test": size.test_images, "seed": 1}
    if not select:
        return load_data(source, limit_train=size.images, **options)
    count = size.images or 45_000
    options["limit_train"] = count + (size.test_images or 5000)
    data = load_data(source, **options)
    return held_back(data, load_data(source, augment=False, **options), count)


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


if __name__ == "__main__":
    main()
