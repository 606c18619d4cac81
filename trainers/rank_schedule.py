"""When rank falls during training, how far, and what stops it. Ranks never rise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from converter.cost import count_parameters
from converter.errors import StiefelError
from converter.ranks import Budget, Energy, Fixed, Policy, parse_rank, policy_rank
from converter.settings import Settings
from trainers.manifold import direction_energies, tied_layers

_TINY = torch.finfo(torch.float64).tiny


class RankSchedule(Settings):
    """Ranks fall in equal parts at the start of some epochs; off unless `final` or `energy` is set.

    `final` says how far they fall, `energy` what each layer may keep regardless, because its own
    singular values say that it uses them. Where the two disagree, `energy` wins and the final
    target is not met.
    """

    final: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        description="ranks at the end: 32, 0.25 of full rank, energy=0.9, or params=0.3 of the "
        "whole dense model; none: wherever energy leads",
    )
    energy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of ΣS² that every layer keeps over all falls, whatever final says; "
        "none: no such limit",
    )
    floor: int = Field(4, ge=1, description="no layer falls below this rank")
    start: int = Field(2, ge=1, description="first epoch that begins with lower ranks")
    end: int | None = Field(
        None, ge=1, description="epoch that begins with the final ranks; none: 3/4 of the way"
    )
    every: int = Field(1, ge=1, description="epochs between two falls")

    @field_validator("final")
    @classmethod
    def _possible(cls, final: str | None) -> str | None:
        if final is not None:
            try:
                policy = parse_rank(final)
            except StiefelError as error:
                raise ValueError(str(error)) from error
            if isinstance(policy, Budget) and policy.params is None:
                raise ValueError(f"give 32, 0.25, energy=0.9 or params=0.3, not {policy.cost}=")
        return final

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.end is not None and self.end < self.start:
            raise ValueError(f"end ({self.end}) comes before start ({self.start})")
        fields = type(self).model_fields
        idle = [name for name in fields if getattr(self, name) != fields[name].default]
        if idle and not self.active:
            raise ValueError(f"{idle[0]} says how ranks fall: give final or energy too")
        return self

    @property
    def policy(self) -> Policy | None:
        """`final`, read."""
        return None if self.final is None else parse_rank(self.final)

    @property
    def active(self) -> bool:
        """Whether ranks fall at all."""
        return self.final is not None or self.energy is not None


@dataclass(frozen=True)
class LayerRank:
    """What the schedule looks at in one layer.

    Attributes:
        energies: (r,) float64, S² of each direction, descending; summed over groups.
        full_rank: min(m, n).
        cost: parameters that one direction adds.
        dense: parameters of the dense weight.
        kept: share of the energy, 0..1, that earlier falls left, each of what it found.
    """

    energies: Tensor
    full_rank: int
    cost: int
    dense: int
    kept: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return len(self.energies)

    def tail(self) -> Tensor:
        """(r,): share of the energy that keeping 1 … r directions would drop."""
        kept = self.energies.cumsum(0)
        # A layer that is zero, as some heads begin, has nothing to lose.
        return (1 - kept / kept[-1]).clamp(min=0) if kept[-1] > 0 else torch.zeros_like(kept)

    def energy_rank(self, share: float) -> int:
        """The fewest directions that keep `share` of the energy, earlier falls included."""
        return int((self.tail() > 1 - share / self.kept + 1e-12).sum()) + 1

    def kept_at(self, rank: int) -> float:
        """What `kept` becomes when the rank falls to this one."""
        return self.kept * (1 - float(self.tail()[rank - 1]))


@dataclass(frozen=True)
class ModelRanks:
    """Every factored layer by name, tied ones once, and the parameters of all the rest."""

    layers: Mapping[str, LayerRank]
    rest: int

    @property
    def dense(self) -> int:
        """Parameters of the dense model."""
        return self.rest + sum(layer.dense for layer in self.layers.values())

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Parameters of the model at these ranks."""
        return self.rest + sum(ranks[name] * layer.cost for name, layer in self.layers.items())

    def ranks(self) -> dict[str, int]:
        """The ranks as they are."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def kept_at(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Each layer's `kept` once it has fallen to its rank here."""
        return {name: layer.kept_at(ranks[name]) for name, layer in self.layers.items()}


def look(model: nn.Module, kept: Mapping[str, float] | None = None) -> ModelRanks:
    """What the schedule needs to know of a model; reads S from the device.

    Args:
        kept: layers' shares of energy that earlier falls left, where there were any.
    """
    layers = {}
    for name, (layer, *_) in tied_layers(model).items():
        groups = layer.S.numel() // layer.rank
        m, n = layer.matrix_shape
        energies = direction_energies(layer).cpu().sort(descending=True).values
        sizes = layer.full_rank, groups * (m + n + 1), groups * m * n
        layers[name] = LayerRank(energies, *sizes, kept=(kept or {}).get(name, 1.0))
    factored = sum(layer.rank * layer.cost for layer in layers.values())
    return ModelRanks(layers, count_parameters(model) - factored)


def falls(schedule: RankSchedule, epochs: int) -> list[int]:
    """The epochs (from 1) that begin with lower ranks; the last one with the final ranks."""
    if not schedule.active:
        return []
    end = schedule.end or max(schedule.start, 3 * epochs // 4)
    # Counted back from the end, so that the final ranks come when they are due.
    return list(range(end, schedule.start - 1, -schedule.every))[::-1]


def check_epochs(schedule: RankSchedule, epochs: int) -> None:
    """Refuse ranks that would never fall as far as they should.

    Raises:
        StiefelError: names the epoch that never comes.
    """
    if schedule.active and (last := falls(schedule, epochs)[-1]) > epochs:
        raise StiefelError(f"ranks: epoch {last} never comes in {epochs} epochs; lower start, end")


def check_schedule(schedule: RankSchedule, epochs: int, model: ModelRanks) -> None:
    """Refuse what can't be done, before anything is trained.

    Raises:
        StiefelError: no factored layer, epochs that never come, or a final rank above a layer's
            own.
    """
    if not schedule.active:
        return
    if not model.layers:
        raise StiefelError("ranks: the model has no factored layer whose rank could fall")
    check_epochs(schedule, epochs)
    policy = schedule.policy
    if isinstance(policy, Budget):
        share = model.parameters(model.ranks()) / model.dense
        if policy.fraction > share:
            raise StiefelError(
                f"ranks: final {policy} is above the {share:.3f} of the dense model's parameters "
                "that the model has already; a schedule only lowers ranks"
            )
    ranks = model.ranks()
    wanted = _wanted(schedule, 1.0, model, ranks)
    above = [name for name, rank in wanted.items() if rank > ranks[name]]
    # One rank for all layers is for those that have more, as in conversion.
    if above and not (isinstance(policy, Fixed) and policy.rank <= max(ranks.values())):
        highest = max(above, key=ranks.__getitem__)
        raise StiefelError(
            f"ranks: final {schedule.final} asks for rank {wanted[highest]} in layer {highest}, "
            f"which has rank {ranks[highest]}; a schedule only lowers ranks"
        )


def lowered(
    schedule: RankSchedule, epoch: int, epochs: int, model: ModelRanks, start: Mapping[str, int]
) -> dict[str, int]:
    """The layers' ranks for `epoch` (from 1), never above those they have.

    Args:
        model: as it is now.
        start: the ranks with which training began.
    """
    due = falls(schedule, epochs)
    ranks = model.ranks()
    if epoch not in due:
        return ranks
    share = (due.index(epoch) + 1) / len(due)
    wanted = _wanted(schedule, share, model, start)
    for name, layer in model.layers.items():
        used = layer.energy_rank(_partly(schedule.energy, share)) if schedule.energy else 1
        ranks[name] = min(ranks[name], max(wanted[name], used, schedule.floor))
    return ranks


def shortfall(schedule: RankSchedule, model: ModelRanks) -> str | None:
    """In one line, that a trained model keeps more than `final` asked for, if it does."""
    policy, ranks = schedule.policy, model.ranks()
    if isinstance(policy, Budget):
        share = model.parameters(ranks) / model.dense
        if share <= policy.fraction * (1 + 1e-9):
            return None
        return f"final {policy} was not reached: {share:.3f} of the dense parameters are left"
    if policy is None or isinstance(policy, Energy):
        return None
    wanted = {name: policy_rank(policy, one.full_rank, None) for name, one in model.layers.items()}
    above = [name for name, rank in ranks.items() if rank > max(wanted[name], schedule.floor)]
    if not above:
        return None
    more = f" and {len(above) - 1} more layers" if len(above) > 1 else ""
    return f"final {schedule.final} was not reached: {above[0]} has rank {ranks[above[0]]}{more}"


def _wanted(
    schedule: RankSchedule, share: float, model: ModelRanks, start: Mapping[str, int]
) -> dict[str, int]:
    """What `final` alone asks for when `share` (0..1) of the way is gone."""
    policy, layers = schedule.policy, model.layers
    if policy is None:
        return dict.fromkeys(layers, 1)
    if isinstance(policy, Energy):
        energy = _partly(policy.energy, share)
        return {name: layer.energy_rank(energy) for name, layer in layers.items()}
    if isinstance(policy, Budget):
        at_start = model.parameters(start) / model.dense
        target = at_start + share * (policy.fraction - at_start)
        return _within_budget(target, model, schedule.floor)
    final = {
        name: min(policy_rank(policy, layer.full_rank, None), layer.full_rank)
        for name, layer in layers.items()
    }
    return {name: round(start[name] + share * (rank - start[name])) for name, rank in final.items()}


def _partly(energy: float, share: float) -> float:
    """The energy that is to be left when `share` (0..1) of the way to `energy` is gone."""
    return 1 - share * (1 - energy)


def _within_budget(target: float, model: ModelRanks, floor: int) -> dict[str, int]:
    """The ranks that lose least relative energy in `target` × the dense model's parameters.

    Directions are kept in the order of their share of the layer's energy for each parameter: since
    energies descend, that is the minimum of Σ relative tail energy but for the last direction.

    Raises:
        StiefelError: the floor alone takes more.
    """
    ranks = {name: min(floor, layer.rank) for name, layer in model.layers.items()}
    left = target * model.dense * (1 + 1e-9) - model.parameters(ranks)
    if left < 0:
        least = math.ceil(model.parameters(ranks) / model.dense * 1e4) / 1e4
        raise StiefelError(
            f"ranks: final params={target:.4g} is out of reach; with every layer at the floor, "
            f"rank {floor}, params={least} remains"
        )
    worth = [
        (float(energy / layer.energies.sum().clamp_min(_TINY)) / layer.cost, name)
        for name, layer in model.layers.items()
        for energy in layer.energies[ranks[name] :]
    ]
    for _, name in sorted(worth, key=lambda direction: -direction[0]):
        if (cost := model.layers[name].cost) <= left:
            ranks[name] += 1
            left -= cost
    return ranks
