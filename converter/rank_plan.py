"""Rank plans: for every layer, which scheme and rank a policy means."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from typing import Any

from pydantic import Field, PrivateAttr, computed_field, model_validator

from converter.decompose import Spectrum
from converter.errors import StiefelError, did_you_mean
from converter.schemes import Scheme, matrix_shape
from converter.settings import Settings


class _Written(Settings):
    """Written with what follows from its fields, which is found anew when it is read back."""

    @model_validator(mode="before")
    @classmethod
    def _drop_computed(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {k: v for k, v in data.items() if k not in cls.model_computed_fields}
        return data


class LayerPlan(_Written):
    """What becomes of one layer.

    Edit a plan with `RankPlan.with_rank`, or scheme and rank in its JSON: `revise` then finds anew
    what follows from them.
    """

    name: str = Field(description="the layer, as in model.named_modules()")
    kind: str = Field(description="Linear, Conv2d, ...; 'factored Conv2d' if it already was")
    scheme: Scheme | None = Field(None, description="spatial or channel; none for linear layers")
    rank: int | None = Field(None, description="rank to factor to; none keeps the layer as it is")
    full_rank: int = Field(0, description="the rank at which nothing is lost")
    current_rank: int | None = Field(None, description="the rank of a layer that is factored")
    shape: tuple[int, ...] = Field((), description="shape of the dense weight")
    groups: int = Field(1, description="groups of a convolution")
    dense_parameters: int = Field(0, description="parameters of the layer as it is")
    bias_parameters: int = Field(0, description="of which bias")
    parameters_per_rank: int = Field(0, description="parameters that each rank adds")
    dense_macs: int | None = Field(None, description="MACs per image of the layer as it is")
    macs_per_rank: int | None = Field(None, description="MACs per image that each rank adds")
    expected_error: float | None = Field(
        None, description="relative Frobenius error of the weight, in the norm used, 0 to 1"
    )
    reason: str | None = Field(None, description="why the layer is kept as it is")
    tied_to: str | None = Field(None, description="the layer that owns the shared weight")

    @model_validator(mode="after")
    def _possible_rank(self) -> LayerPlan:
        check_rank(self.name, self.rank, self.highest_rank)
        return self

    @computed_field
    @property
    def factored_parameters(self) -> int:
        """Parameters of the layer as planned."""
        if self.rank is None:
            return self.dense_parameters
        if self.tied_to is not None:
            return self.bias_parameters
        return self.bias_parameters + self.rank * self.parameters_per_rank

    @computed_field
    @property
    def factored_macs(self) -> int | None:
        """MACs per image of the layer as planned, if they were counted."""
        if self.rank is None or self.macs_per_rank is None:
            return self.dense_macs
        return self.rank * self.macs_per_rank

    @property
    def highest_rank(self) -> int:
        """The highest rank that can be asked for."""
        if self.current_rank is not None:
            return self.current_rank
        if self.scheme is None:
            return self.full_rank
        return min(matrix_shape(self.shape, self.scheme, self.groups))


class RankPlan(_Written):
    """What becomes of every layer of a model: readable, serialisable, editable."""

    layers: tuple[LayerPlan, ...] = Field(description="every layer with a weight, in model order")
    policy: str = Field(description="the policy that made the plan")
    dense_parameters: int = Field(description="parameters of the whole model as it is")
    dense_macs: int | None = Field(None, description="MACs per image of the whole model as it is")
    dense_latency_ms: float | None = Field(
        None, description="time of one pass of the example batch, if it was measured"
    )
    factored_latency_ms: float | None = Field(
        None, description="the same with the planned layers as two plain layers each"
    )
    timed: str | None = Field(
        None, description="fingerprint of the schemes and ranks that factored_latency_ms is of"
    )

    # Decompositions found while planning; `convert` in the same process need not repeat them.
    _spectra: dict[tuple[str, str | None], Spectrum] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _each_layer_once(self) -> RankPlan:
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise StiefelError(f"the plan has the layer '{twice[0]}' twice")
        return self

    @computed_field
    @property
    def factored_parameters(self) -> int:
        """Parameters of the whole model as planned."""
        saved = sum(p.dense_parameters - p.factored_parameters for p in self.layers)
        return self.dense_parameters - saved

    @computed_field
    @property
    def factored_macs(self) -> int | None:
        """MACs per image of the whole model as planned, if they were counted."""
        if self.dense_macs is None:
            return None
        return self.dense_macs - sum(
            (p.dense_macs or 0) - (p.factored_macs or 0) for p in self.layers
        )

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise StiefelError(f"the plan has no layer '{name}'{did_you_mean(name, self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(layer.name for layer in self.layers)

    @property
    def factored(self) -> tuple[LayerPlan, ...]:
        """The layers that will be factored, or factored further."""
        return tuple(layer for layer in self.layers if layer.rank is not None)

    @property
    def fingerprint(self) -> str:
        """Of the schemes and ranks: tells an edited plan from the one that was timed."""
        chosen = [(layer.name, layer.scheme, layer.rank) for layer in self.factored]
        return sha256(repr(chosen).encode()).hexdigest()[:16]

    def with_rank(self, name: str, rank: int | None) -> RankPlan:
        """The plan with another rank for one layer and those tied to it; None keeps it as it is.

        Raises:
            StiefelError: no such layer, or the rank is impossible, or the layer can't be factored.
        """
        chosen = self[name]
        owner = chosen.tied_to or chosen.name
        if rank is not None and not chosen.full_rank:
            raise StiefelError(f"{name} cannot be factored: {chosen.reason}")
        check_rank(name, rank, chosen.highest_rank)
        spectrum = self._spectra.get((owner, chosen.scheme))
        changes = {
            "rank": rank,
            "reason": "kept by request" if rank is None else None,
            "expected_error": spectrum_error(spectrum, rank),
        }
        layers = tuple(
            p.model_copy(update=changes) if owner in (p.name, p.tied_to) else p for p in self.layers
        )
        return self.model_copy(update={"layers": layers}).with_latency_of(self)

    def with_latency_of(self, plan: RankPlan) -> RankPlan:
        """With what was measured for a plan of the same model, the factored one's if it is this."""
        timed = plan.timed if plan.timed == self.fingerprint else None
        latency = {
            "dense_latency_ms": plan.dense_latency_ms,
            "factored_latency_ms": plan.factored_latency_ms if timed else None,
        }
        return self.model_copy(update={**latency, "timed": timed})

    def without_spectra(self) -> RankPlan:
        """The plan as it would be read back: light enough to travel with a model."""
        return RankPlan(**dict(self))

    def to_json(self) -> str:
        """The plan as indented JSON."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> RankPlan:
        """Read a plan back, edited or not; how long an edited one takes is not known.

        Raises:
            StiefelError: the text is not a plan; the first fault is named.
        """
        try:
            plan = cls.model_validate_json(text)
        except ValueError as error:
            fault = error.errors()[0] if hasattr(error, "errors") else {"msg": error, "loc": ()}
            where = ".".join(str(part) for part in fault["loc"])
            raise StiefelError(f"not a rank plan: {where}: {fault['msg']}") from None
        return plan.with_latency_of(plan)


def spectrum_error(spectrum: Spectrum | None, rank: int | None) -> float | None:
    """The error of a rank if the spectrum reaches so far; 0 where nothing is changed."""
    if rank is None:
        return 0.0
    if spectrum is None or rank > spectrum.values.shape[-1]:
        return None
    return spectrum.error(rank)


def check_rank(name: str, rank: int | None, highest: int) -> None:
    """Refuse a rank below 1 or above the highest by the layer's name."""
    if rank is not None and not 1 <= rank <= highest:
        right = f"choose 1 to {highest}" if highest else "it can only be kept as it is"
        raise StiefelError(f"{name}: rank {rank} is not possible; {right}")
