"""The declarative recipe: YAML in, a resolved and validated recipe out, every default visible."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, JsonValue, ValidationError

from converter.calibration import Calibration
from converter.errors import StiefelError
from converter.files import write_text
from converter.settings import LARGEST_SEED, Settings
from converter.specs import InputChange
from export.bench import BenchSettings
from export.onnx import OnnxSettings
from stiefel.validation import describe, line_of, written
from trainers.rules import BP, DFA, SSA
from trainers.trainer import TrainSettings

# Sections that train, and which of their settings stand at the recipe's top instead.
_TRAININGS, _COMMON = ("pretrain", "train"), ("seed", "device")
RuleChoice = Annotated[SSA | DFA | BP, Field(discriminator="name")]


class DataSection(Settings):
    """Which images train and test the model."""

    source: str = Field(
        "digits", description="digits, cifar10:DIR, imagefolder:DIR, fake:CxHxW, FILE.py:factory, …"
    )
    limit_train: int | None = Field(
        None, ge=1, description="train on this many images only, drawn class by class"
    )
    limit_test: int | None = Field(
        None, ge=1, description="test on this many images only, drawn class by class"
    )
    augment: bool = Field(True, description="random shifts, crops and flips as suit the data")


class ModelSection(Settings):
    """The dense model: a factory, and where its weights come from."""

    name: str | None = Field(
        None,
        description="torchvision:NAME, timm:NAME, zoo:NAME, FILE.py:factory or package.module:f; "
        "not needed where the checkpoint is stiefel's own",
    )
    checkpoint: Path | None = Field(
        None, description="weights: .safetensors (also sharded), .pt, .pth"
    )
    weights: str | None = Field(None, description="the library's own weights, such as DEFAULT")
    args: dict[str, JsonValue] = Field(
        default_factory=dict, description="arguments of the model's factory"
    )
    rename: tuple[str, ...] = Field(
        (), description="'REGEX=REPLACEMENT' applied to the checkpoint's tensor names"
    )
    variant: str | None = Field(
        None, description="which of several nested state dicts, such as model_ema"
    )
    input: InputChange | None = Field(
        None, description="what differs of its images' shape, mean, std, resize, interpolation"
    )


class ConvertSection(Settings):
    """How the dense model becomes a factored one."""

    rank: str = Field(
        "params=0.5",
        coerce_numbers_to_str=True,
        description="32, 0.25 (of full rank), energy=0.95, params=0.5, macs=0.5 or latency=0.5",
    )
    batch: int = Field(1, ge=1, description="images to a pass, as a latency budget is measured")
    scheme: Literal["spatial", "channel", "auto"] = Field(
        "spatial", description="how a kernel becomes a matrix"
    )
    layers: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="per-layer exceptions by glob: keep, or {rank: …, scheme: …}",
    )
    calibrate: str | None = Field(
        "data",
        description="images that calibrate: a data source, data (the recipe's own training "
        "images), or none",
    )
    calibrate_images: int = Field(500, ge=1, description="how many images calibrate")
    calibration: Calibration = Field(
        default_factory=Calibration, description="which calibration steps run, and how"
    )


class TrainSection(TrainSettings):
    """Local training of the factored model."""

    rule: RuleChoice = Field(default_factory=SSA, description="the learning rule and its terms")
    teach: bool = Field(
        True, description="give the rule the dense original, for local distillation"
    )


class ExportSection(Settings):
    """What is written for deployment."""

    formats: tuple[Literal["safetensors", "onnx"], ...] = Field(
        ("safetensors", "onnx"), description="which files to write"
    )
    onnx: OnnxSettings = Field(default_factory=OnnxSettings, description="how ONNX is written")


class Recipe(Settings):
    """A whole road: build, pretrain, convert, train, export, bench; absent sections are skipped."""

    name: str = Field("run", description="names the run folder")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="the one seed of everything random")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA where there is one"
    )
    data: DataSection = Field(default_factory=DataSection, description="the images")
    model: ModelSection = Field(description="the dense model")
    pretrain: TrainSettings | None = Field(
        None, description="train the dense model by backpropagation first"
    )
    convert: ConvertSection | None = Field(None, description="factor it")
    train: TrainSection | None = Field(None, description="train the factored model locally")
    export: ExportSection | None = Field(None, description="write files for deployment")
    bench: BenchSettings | None = Field(None, description="time dense against factored")


def load_recipe(path: str | Path, changes: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` changes to it.

    Relative paths in a recipe are relative to the current folder, as on the command line.

    Raises:
        StiefelError: no such file, no YAML, or keys or values that don't fit; names file and line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text)
        document = yaml.safe_load(text)
    except OSError as error:
        raise StiefelError(f"cannot read recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        reason = getattr(error, "problem", None) or error
        raise StiefelError(f"{path}{line}: not valid YAML: {reason}") from error
    _refuse_misleading(node, path, within=())
    if not isinstance(document, dict):
        raise StiefelError(f"{path}: a recipe is a mapping of sections such as model: and convert:")
    for change in changes:
        _apply(document, change)
    # An empty section (`convert:`, nothing below) asks for its defaults, `convert: off` for none.
    document = {
        key: {} if value is None else value for key, value in document.items() if value is not False
    }
    _refuse_second_homes(document, path)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        # A misspelt key is often why another is missing, and tells more.
        problem = min(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
        place = _origin(path, node, problem["loc"], changes)
        raise StiefelError(f"{place}: {describe(problem, Recipe)}") from error


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default filled in, as `load_recipe` reads it."""
    document = recipe.model_dump(mode="json", exclude={key: set(_COMMON) for key in _TRAININGS})
    # Read again, a section that is null would ask for its defaults.
    return {key: False if value is None else value for key, value in document.items()}


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe as YAML, atomically."""
    write_text(path, yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True))


def _origin(
    path: Path, node: yaml.Node, location: tuple[int | str, ...], changes: tuple[str, ...]
) -> str:
    """Where a wrong value came from: the change that set it, or the recipe's file and line."""
    for change in changes:
        keys = change.partition("=")[0].split(".")
        place = written(location, Recipe)
        common = min(len(keys), len(place))  # a section as a whole may be wrong by one of its keys
        if common and keys[:common] == place[:common]:
            return change
    line = line_of(node, location)
    return f"{path}, line {line}" if line else str(path)


def _refuse_misleading(node: yaml.Node | None, path: Path, within: tuple[yaml.Node, ...]) -> None:
    """YAML takes the last of two values of one key, and an alias within what it names: silently."""
    if any(node is outer for outer in within):
        line = node.start_mark.line + 1
        why = "an alias stands within what it names; write it out"
        raise StiefelError(f"{path}, line {line}: {why}")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_misleading(item, path, (*within, node))
    seen = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value in seen:
            line = key.start_mark.line + 1
            raise StiefelError(f"{path}, line {line}: '{key.value}' is there twice; leave one out")
        seen.add(key.value)
        _refuse_misleading(value, path, (*within, node))


def _refuse_second_homes(document: dict[str, Any], path: Path) -> None:
    """Seed and device hold for the whole recipe, so a section may not have its own."""
    for section in _TRAININGS:
        fields = document.get(section)
        for key in _COMMON:
            if isinstance(fields, dict) and key in fields:
                raise StiefelError(
                    f"{path}: {section}.{key} has no place there; write {key} once, at the top"
                )


def _apply(document: dict[str, Any], change: str) -> None:
    """Set one `section.key=value` in the raw document; the value is read as YAML."""
    dotted, separator, text = change.partition("=")
    if not separator or not dotted:
        raise StiefelError(f"'{change}' is no change; write section.key=value")
    *sections, key = dotted.split(".")
    place = document
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise StiefelError(f"'{change}': {section} is a value, not a section")
    try:
        place[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise StiefelError(f"'{change}': the value is not valid YAML") from error
