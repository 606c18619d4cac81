"""What a model is and what it eats, as plain data: enough to build it again from a checkpoint."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator
from torch import nn

from converter.errors import StiefelError
from converter.settings import Settings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _written(shape: Any) -> Any:
    """3x32x32, as shapes are written elsewhere; whatever else there is goes on to be checked."""
    text = shape[0] if isinstance(shape, list | tuple) and len(shape) == 1 else shape
    if not isinstance(text, str):
        return shape
    try:
        return parse_shape(text)
    except StiefelError as error:
        raise ValueError(str(error)) from error


class InputSpec(Settings):
    """What the model expects of an image: shape after cropping, then (x - mean) / std on 0..1."""

    shape: tuple[int, int, int] = Field(
        (3, 224, 224), description="channels, height and width of one image"
    )
    mean: tuple[float, ...] = Field(
        IMAGENET_MEAN, description="per-channel mean subtracted from pixels scaled to 0..1"
    )
    std: tuple[float, ...] = Field(
        IMAGENET_STD, description="per-channel standard deviation divided by"
    )
    resize: int | None = Field(
        None, ge=1, description="short side to resize to before the centre crop; none: to cover it"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic"] = Field(
        "bilinear", description="how images are resized"
    )

    _shape = field_validator("shape", mode="before")(_written)

    @model_validator(mode="after")
    def _consistent(self) -> "InputSpec":
        if min(self.shape) < 1:
            raise ValueError(f"the input shape {self.shape} must be positive")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.shape[0]:
                raise ValueError(
                    f"{name} has {len(values)} values for {self.shape[0]} channels; give one each"
                )
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self

    @classmethod
    def plain(cls, shape: tuple[int, int, int], **fields: Any) -> "InputSpec":
        """Pixels scaled to 0..1 and nothing more, for images of `shape` (C, H, W)."""
        channels = shape[0]
        return cls(shape=shape, mean=(0.0,) * channels, std=(1.0,) * channels, **fields)

    @classmethod
    def natural(cls, shape: tuple[int, int, int], **fields: Any) -> "InputSpec":
        """ImageNet's normalisation; its average over the colours where there aren't three."""
        channels = shape[0]
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if channels != 3:
            mean = (round(sum(mean) / 3, 4),) * channels
            std = (round(sum(std) / 3, 4),) * channels
        return cls(shape=shape, mean=mean, std=std, **fields)


class InputChange(Settings):
    """What is to be said otherwise of a model's input; what is none stays as the model has it."""

    shape: tuple[int, int, int] | None = Field(
        None, description="channels, height and width of one image; none: the model's own"
    )
    mean: tuple[float, ...] | None = Field(
        None, description="subtracted from each channel, scaled to 0..1; none: the model's own"
    )
    std: tuple[float, ...] | None = Field(
        None, description="each channel's standard deviation, divided by; none: the model's own"
    )
    resize: int | None = Field(
        None,
        ge=1,
        description="short side to resize to before the centre crop; none: the model's own, or to "
        "cover another shape",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = Field(
        None, description="how images are resized; none: the model's own"
    )

    _shape = field_validator("shape", mode="before")(_written)

    def of(self, expected: InputSpec) -> InputSpec:
        """The model's input with these changes.

        A resize belongs to the shape that is cropped from it: another shape drops it.

        Raises:
            StiefelError: the changes don't fit what stays, such as three means for one channel.
        """
        changes = {key: value for key, value in self if value is not None}
        if changes.get("shape", expected.shape) != expected.shape:
            changes = {"resize": None} | changes
        try:
            return InputSpec(**dict(expected) | changes)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise StiefelError(f"the model's input: {reason}") from error


class ModelSpec(Settings):
    """Name, arguments and input of a model: what `converter.models.load` needs to rebuild it."""

    name: str = Field(description="torchvision:NAME, timm:NAME, zoo:NAME, FILE.py:f or package:f")
    args: dict[str, JsonValue] = Field(default_factory=dict, description="the factory's arguments")
    input: InputSpec = Field(default_factory=InputSpec, description="what the model expects")
    num_classes: int = Field(ge=1, description="length of the output vector")


def spec_of(model: nn.Module) -> ModelSpec | None:
    """The specification that `load` left on the model, or None for a model made by hand."""
    return getattr(model, "stiefel_spec", None)


def parse_shape(text: str) -> tuple[int, int, int]:
    """Read '3x32x32' as (C, H, W).

    Raises:
        StiefelError: it isn't three positive whole numbers.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise StiefelError(f"'{text}' is no image shape; write CxHxW, such as 3x32x32")
    channels, height, width = map(int, parts)
    return channels, height, width


def checked_args(args: Mapping[str, Any]) -> dict[str, JsonValue]:
    """The arguments as plain data.

    Raises:
        StiefelError: one of them can't be written to a checkpoint (a class, a tensor...).
    """
    try:
        return ModelSpec(name="", args=dict(args), num_classes=1).args
    except ValidationError as error:
        culprit = error.errors()[0]["loc"][1]
        raise StiefelError(
            f"model argument '{culprit}' must be plain data (numbers, text, lists), so that a "
            "checkpoint can rebuild the model; for more, write a factory and name it FILE.py:f"
        ) from error
