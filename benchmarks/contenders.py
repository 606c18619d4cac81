"""Who takes part where training steps are compared: each rule on its own copy of a network."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from converter.convert import convert, plan
from converter.models import load
from trainers.capture import RecordedStep, can_record
from trainers.device import autocast
from trainers.distributed import World
from trainers.layout import lay_out
from trainers.rules import BP, DFA, SSA, RuleSettings, StepResult, make_rule
from trainers.rules.sampling import few
from trainers.settings import TrainSettings
from trainers.update import Update

RULES: dict[str, tuple[str, RuleSettings]] = {
    "backprop, dense": ("dense", BP()),
    "backprop": ("factored", BP()),
    "dfa, stored": ("factored", DFA(boundaries="units")),
    "ssa global, recomputed": (
        "factored",
        SSA(error="global", storage="recomputed", boundaries="units"),
    ),
    "ssa": ("factored", SSA()),
    "ssa, memory 0": ("factored", SSA(memory=0)),
    "ssa, memory 0.25": ("factored", SSA(memory=0.25)),
    "ssa, linear read-outs": ("factored", SSA(readout_layers=0)),
    "ssa, two convolutions": ("factored", SSA(readout_layers=2)),
    "ssa, read-outs 32 wide": ("factored", SSA(readout_width=32)),
    "ssa, pool 2": ("factored", SSA(pool=2)),
    "ssa, sample 4": ("factored", SSA(sample=4)),
    "ssa, sample 4, memory 0.25": ("factored", SSA(sample=4, memory=0.25)),
    "ssa, sample 4, memory 0": ("factored", SSA(sample=4, memory=0)),
    "ssa, cut at units": ("factored", SSA(boundaries="units")),
    "ssa, cut at layers": ("factored", SSA(boundaries="layers")),
    "ssa, no similarity": ("factored", SSA(similarity=0.0)),
    "ssa, two blocks at once": ("factored", SSA(overlap=2)),
    "ssa, memory 0.25, two at once": ("factored", SSA(memory=0.25, overlap=2)),
    "ssa, memory 0.25, four at once": ("factored", SSA(memory=0.25, overlap=4)),
    "ssa, cut at units, four at once": ("factored", SSA(boundaries="units", overlap=4)),
    "ssa, linear read-outs, two at once": ("factored", SSA(readout_layers=0, overlap=2)),
}
ON_CUDA = [name for name in RULES if name.endswith("at once")]  # alike on a CPU
# Network: what to load, images' shape, classes, images to a step on a CPU and on a GPU.
NETWORKS = {
    "vgg13": ("zoo:vgg13", (3, 32, 32), 10, 64, 512),
    "resnet32": ("zoo:resnet32", (3, 32, 32), 10, 128, 512),
    "smallconv": ("zoo:smallconv", (3, 32, 32), 10, 128, 1024),
    "mobilenetv1": ("zoo:mobilenetv1", (3, 32, 32), 10, 128, 1024),
    "resnet50": ("torchvision:resnet50", (3, 224, 224), 1000, 8, 64),
    "vit_b_16": ("torchvision:vit_b_16", (3, 224, 224), 1000, 4, 64),
}


@dataclass(eq=False)
class Contender:
    """One rule on its own copy of a network, ready to step."""

    name: str
    network: nn.Module
    state: nn.Module
    learn: Callable[[], StepResult]  # forward and backward
    update: Callable[[], None]  # the optimizer and the retraction
    seconds: list[tuple[float, float]] = field(default_factory=list)  # of learning, and updating


def samples(rule: str, images: int) -> bool:
    """Whether so many images are enough to learn from some of them, if that is the rule."""
    every = getattr(RULES[rule][1], "sample", 1)
    return every == 1 or few(images, every) < images


def network_and_images(
    key: str, device: torch.device, batch: int | None
) -> tuple[nn.Module, Tensor, int]:
    """One of `NETWORKS`, dense; random images for it, as many as suit the device; its classes."""
    spec, shape, classes, few, many = NETWORKS[key]
    torch.manual_seed(0)
    return (
        load(spec),
        torch.randn(batch or (many if device.type == "cuda" else few), *shape),
        classes,
    )


class Preparation:
    """Makes contenders that all step on the same images.

    Args:
        dense: the network; it is left as it is.
        x: (N, C, H, W), on the device to step on.
        classes: width of the network's output.
        rank: of the factored form, as for `stiefel convert`.
    """

    def __init__(
        self, dense: nn.Module, x: Tensor, classes: int, rank: str, settings: TrainSettings
    ) -> None:
        factored = convert(dense, plan(dense, rank, example=x[:1].cpu()))
        self._forms = {"dense": copy.deepcopy(dense), "factored": factored}
        layout = lay_out(settings.memory_format, x, *self._forms.values())
        self._x, self._classes = x.contiguous(memory_format=layout), classes
        self._labels = torch.arange(len(x), device=x.device) % classes
        self._settings = settings

    def __call__(self, name: str, *, record: bool) -> Contender:
        """A contender with a training step of its own, recorded as the trainer would if asked."""
        (form, rule), settings, device = RULES[name], self._settings, self._x.device
        network = copy.deepcopy(self._forms[form]).train()
        learner = make_rule(rule)
        generator = torch.Generator().manual_seed(0)
        state = learner.init(network, self._x, self._classes, generator).to(device)
        update = Update(network, state, settings, device, World(), steps=100_000)
        done = iter(range(100_000))

        def learn(x: Tensor, labels: Tensor) -> StepResult:
            with autocast(device, settings.precision):
                return learner.step(network, state, x, labels, scale=update.scale())

        if record and can_record(rule, device, processes=1):
            learn = RecordedStep(learn, (network, state))
            update.record()
        whole = partial(learn, self._x, self._labels)
        return Contender(name, network, state, whole, lambda: update(next(done)))
