"""What a recipe or a command line names, made real: the model, the data, the plan."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from converter import convert as factoring
from converter.checkpoints import load_any
from converter.cost import dtype_of
from converter.errors import StiefelError
from converter.models import load
from converter.rank_plan import RankPlan
from converter.ranks import parse_rank
from converter.specs import ModelSpec, spec_of
from stiefel.recipe import ConvertSection, DataSection, ModelSection
from trainers.data import Data, images, load_data


def build(section: ModelSection, note: Callable[[str], None] | None = None) -> nn.Module:
    """The model that a recipe or a command line names: by factory, or by a checkpoint of ours.

    Raises:
        StiefelError: neither is given, it can't be loaded, or it is said how to build a model that
            the checkpoint describes itself.
    """
    if section.name is None:
        if section.checkpoint is None:
            raise StiefelError("no model: give its name (zoo:resnet32, …) or a stiefel checkpoint")
        for key in ("args", "weights", "input", "rename", "variant"):
            if getattr(section, key):
                raise StiefelError(
                    f"model.{key} goes with model.name: a checkpoint of ours says what it holds"
                )
        return load_any(section.checkpoint)
    return load(
        section.name,
        checkpoint=section.checkpoint,
        weights=section.weights,
        args=section.args,
        input=section.input,
        rename=section.rename,
        variant=section.variant,
        note=note,
    )


def open_data(section: DataSection, model: nn.Module, *, seed: int) -> Data:
    """The data as this model expects its images.

    Raises:
        StiefelError: the source can't be read, or its classes don't fit the model.
    """
    spec = require_spec(model)
    data = load_data(
        section.source,
        input=spec.input,
        limit_train=section.limit_train,
        limit_test=section.limit_test,
        seed=seed,
        augment=section.augment,
    )
    if len(data.classes) > spec.num_classes:
        raise StiefelError(
            f"{section.source} has {len(data.classes)} classes, {spec.name} tells "
            f"{spec.num_classes} apart; give the model argument num_classes"
        )
    return data


def require_spec(model: nn.Module) -> ModelSpec:
    """What the model is and eats.

    Raises:
        StiefelError: it was made by hand and carries no specification.
    """
    spec = spec_of(model)
    if spec is None:
        raise StiefelError("this model carries no specification; make it with stiefel.load")
    return spec


def load_teacher(
    path: Path, model: nn.Module, note: Callable[[str], None] | None = None
) -> nn.Module:
    """The dense original of a factored model, from any checkpoint of its weights.

    Raises:
        StiefelError: the file can't be read, or holds another model's weights.
    """
    spec = require_spec(model)
    return load_any(path, model=spec.name, args=spec.args, input=spec.input, note=note)


def example_of(model: nn.Module, batch: int = 1) -> torch.Tensor:
    """A seeded random batch (batch, C, H, W) of the model's input shape and dtype, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(batch, *require_spec(model).input.shape, generator=generator)
    return drawn.to(dtype_of(model))


def calibration_images(
    section: ConvertSection, model: nn.Module, data: Data | None, *, seed: int = 0
) -> torch.Tensor | None:
    """The calibration images (N, C, H, W), normalised, or None where none are asked for."""
    if section.calibrate is None:
        return None
    if section.calibrate != "data":
        source = DataSection(source=section.calibrate, augment=False)
        data = open_data(source, model, seed=seed)
    if data is None:
        raise StiefelError("calibrate: data needs the data section; or name a data source")
    return images(data.train, section.calibrate_images, seed)


def make_plan(
    model: nn.Module,
    section: ConvertSection,
    calibration: torch.Tensor | None,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> RankPlan:
    """Scheme and rank for each layer, as the convert section asks."""
    return factoring.plan(
        model,
        parse_rank(section.rank),
        scheme=section.scheme,
        example=example_of(model, section.batch),
        calibration=calibration,
        settings=section.calibration,
        layers=section.layers,
        device=device,
        progress=progress,
    )
