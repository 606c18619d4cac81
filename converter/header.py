"""What the header of our .safetensors says; `converter.checkpoints` has the format in words."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, ValidationError

from converter.errors import StiefelError
from converter.rank_plan import RankPlan
from converter.schemes import Scheme
from converter.settings import Settings
from converter.specs import ModelSpec

FORMAT, VERSION = "stiefel", 1


class LayerRecord(Settings):
    """What a factored layer is, beside its tensors."""

    kind: str = Field(description="class of the factored layer")
    scheme: Scheme | None = Field(description="how its kernel is read as a matrix; null for linear")
    shape: tuple[int, ...] = Field(description="shape of the dense weight")
    rank: int = Field(ge=1, description="directions kept")
    groups: int = Field(1, ge=1, description="groups of a convolution")


class Header(Settings):
    """The header's JSON fields, parsed."""

    model: ModelSpec | None = Field(None, description="how to build the dense model")
    layers: dict[str, LayerRecord] = Field(
        default_factory=dict, description="the factored layers, by name"
    )
    history: list[dict[str, JsonValue]] = Field(
        default_factory=list, description="what was done to the model, oldest first"
    )
    aliases: dict[str, str] = Field(
        default_factory=dict, description="tied tensors: {name: name it is stored under}"
    )
    plan: RankPlan | None = Field(None, description="the plan that the model was converted by")

    def to_metadata(self) -> dict[str, str]:
        """As safetensors' metadata: text under every key."""
        fields = self.model_dump(mode="json")
        texts = {key: json.dumps(value) for key, value in fields.items() if value is not None}
        return {"format": FORMAT, "version": str(VERSION)} | texts

    @classmethod
    def from_metadata(cls, path: str | Path, texts: Mapping[str, str]) -> "Header":
        """Read safetensors' metadata; `path` is for messages.

        Raises:
            StiefelError: not our file, a newer format, or damaged.
        """
        if texts.get("format") != FORMAT:
            raise StiefelError(
                f"{path} wasn't written by stiefel; load it with the name of its model"
            )
        version = texts.get("version", "")
        if not version.isdigit():
            raise StiefelError(f"{path} is damaged: its header has version '{version}'")
        if int(version) > VERSION:
            raise StiefelError(
                f"{path} was written by a newer stiefel (format {version}, this one reads up to "
                f"{VERSION}); upgrade stiefel"
            )
        fields: dict[str, Any] = {}
        for key in set(cls.model_fields) & set(texts):
            try:
                fields[key] = json.loads(texts[key])
            except ValueError as error:
                raise StiefelError(f"{path} is damaged: its header's '{key}' is no JSON") from error
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise StiefelError(
                f"{path} is damaged: its header's {where}: {problem['msg']}"
            ) from error


def sort_metadata(path: Path) -> None:
    """Put a file's metadata in order, in place, so that the same model makes the same file.

    safetensors writes it in random order.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
