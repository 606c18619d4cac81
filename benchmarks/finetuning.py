"""Fine-tuning a converted pretrained network: local distillation against backpropagation.

Every row starts from the same converted network and sees the same images in the same order. Rates
are chosen with `--select`, on 2,000 training images held back; the test images are never looked at
for a choice.
"""

import copy
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import click
from torch import nn

from benchmarks.command_line import Listed, Script
from benchmarks.study import (
    RESULTS,
    Study,
    completed,
    held_back,
    markdown_table,
    matching,
    mean_sd,
    real_data,
)
from converter.convert import convert, plan
from converter.files import write_text
from converter.models import load
from converter.specs import spec_of
from trainers.data import Data, images, load_data
from trainers.evaluate import evaluate
from trainers.rules import BP, SSA, RuleSettings
from trainers.settings import TrainSettings
from trainers.trainer import train_local

CHECKPOINTS = {"resnet32": "resnet32-d509ac18.th", "resnet56": "resnet56-4bfd9763.th"}
HELD_BACK = 2000
# The rules compared: the learning rates tried, by --select; the first is the one chosen there.
METHODS: dict[str, tuple[RuleSettings, tuple[float, ...]]] = {
    "backpropagation": (BP(), (1e-3, 3e-4, 2e-3)),
    "local, looking ahead": (SSA(lookahead=2), (1e-3,)),
    "local, 18 layers to a block, looking ahead": (
        SSA(boundaries="units", layers_per_block=18, lookahead=2, distillation=1.0),
        (1e-3, 3e-3),
    ),
    "local, 18 layers, looking ahead, distillation 0.3": (
        SSA(boundaries="units", layers_per_block=18, lookahead=2, distillation=0.3),
        (1e-3,),
    ),
    "local, memory 0.25, looking ahead to the end": (
        SSA(memory=0.25, lookahead=8, distillation=1.0, storage="recomputed"),
        (1e-3,),
    ),
    "local, 18 layers to a block": (SSA(boundaries="units", layers_per_block=18), (3e-3, 1e-3)),
    "local, 18 layers, cross-entropy 0.3 beside": (
        SSA(boundaries="units", layers_per_block=18, cross_entropy=0.3),
        (3e-3, 1e-3),
    ),
    "local, 6 layers to a block": (SSA(boundaries="units", layers_per_block=6), (3e-3, 1e-3)),
    "local, residual units": (SSA(boundaries="units"), (3e-3, 1e-3, 5e-3)),
}


@click.command(cls=Script, help=__doc__)
@click.option("--network", type=click.Choice([*CHECKPOINTS]), default="resnet56")
@click.option("--images", "count", default=10_000, show_default=True, help="training images")
@click.option(
    "--fractions", type=Listed(float), default="0.25,0.5", show_default=True, help="of parameters"
)
@click.option("--epochs", type=Listed(int), default="1,2", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--methods", multiple=True, help="only rows whose name matches this glob; repeatable")
@click.option("--select", is_flag=True, help="choose rates on held-back training images")
@click.option("--data", help="folder with the checkpoints  [default: $STIEFEL_DATA]")
@click.option("--cifar", required=True, help="folder with train/<class> and test/<class>")
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file of the rows")
def main(
    network, count, fractions, epochs, seeds, methods, select, data, cifar, device, out
) -> None:
    name = f"finetuning-{network}" + ("-selection" if select else "")
    about = {
        "study": name,
        "images": count,
        "batch_size": 128,
        "optimizer": "adamw",
        "calibration": 500,
    }
    study = Study(out or RESULTS / f"{name}.json", about, device)
    dense = load(f"zoo:{network}", checkpoint=real_data(data) / CHECKPOINTS[network])
    held = _data(dense, cifar, count, select)
    study.measure({"method": "dense", "fraction": 1.0}, partial(_accuracy, dense, held))
    small = {}
    for fraction in fractions:
        small[fraction] = _converted(dense, fraction, held)
        study.measure(
            {"method": "converted", "fraction": fraction}, partial(_accuracy, small[fraction], held)
        )
    chosen = matching(METHODS, methods)
    # Seeds come last, so that an unfinished run has a whole table of fewer seeds.
    for seed, length, fraction, method in product(range(seeds), epochs, small, chosen):
        rule, rates = METHODS[method]
        for lr in rates if select else rates[:1]:
            settings = TrainSettings(epochs=length, lr=lr, batch_size=128, seed=seed, device=device)
            study.measure(
                {"method": method, "fraction": fraction, "epochs": length, "lr": lr, "seed": seed},
                partial(_tuned, small[fraction], dense, held, rule, settings),
            )
    table = _table(study)
    print(table)
    write_text(study.path.with_suffix(".md"), table)


def _data(dense: nn.Module, folder: str, count: int, select: bool) -> Data:
    """`count` training images; and the test images, or images held back from training."""
    options = {"input": spec_of(dense).input, "limit_train": count + HELD_BACK, "seed": 1}
    data = load_data(f"imagefolder:{folder}", **options)
    plain = load_data(f"imagefolder:{folder}", augment=False, **options)
    split = held_back(data, plain, count)
    return split if select else replace(split, test=data.test)


def _converted(dense: nn.Module, fraction: float, data: Data) -> nn.Module:
    calibration = images(data.train, 500, 0)
    made = plan(dense, f"params={fraction}", scheme="spatial", calibration=calibration)
    return convert(dense, made, calibration=calibration)


def _accuracy(model: nn.Module, data: Data) -> dict[str, float]:
    return {"accuracy": 100 * evaluate(model, data.test).accuracy}


def _tuned(
    small: nn.Module, dense: nn.Module, data: Data, rule: RuleSettings, settings: TrainSettings
) -> dict[str, float]:
    model, teacher = copy.deepcopy(small), None if isinstance(rule, BP) else copy.deepcopy(dense)
    rest = {"rule": rule, "settings": settings, "teacher": teacher}
    history = completed(train_local(model, data, **rest))
    return {"accuracy": 100 * history.records[-1]["test_accuracy"]}


def _table(study: Study) -> str:
    """One line a method, one column a fraction and number of epochs."""
    tuned = [row for row in study.rows if "epochs" in row]
    columns = sorted({(row["fraction"], row["epochs"]) for row in tuned})
    head = ["accuracy, %", *(f"{f:.0%}, {e} epoch{'s' * (e > 1)}" for f, e in columns)]
    lines = []
    for method in ("dense", "converted"):
        found = {row["fraction"]: row["accuracy"] for row in study.find(method=method)}
        lines.append([method, *(f"{found.get(f, found.get(1.0, 0)):.2f}" for f, _ in columns)])
    for method, lr in dict.fromkeys((row["method"], row["lr"]) for row in tuned):
        cells = [
            [r["accuracy"] for r in study.find(method=method, lr=lr, fraction=f, epochs=e)]
            for f, e in columns
        ]
        lines.append([f"{method}, rate {lr:g}", *(mean_sd(cell) for cell in cells)])
    return markdown_table(head, lines)


if __name__ == "__main__":
    main()
