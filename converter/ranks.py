"""Rank policies, which say how much to keep, and the ranks that they come to.

The budget policies minimise Σ over layers of relative tail energy + λ · cost, dense being one of
every layer's options, and bisect λ until the cost meets the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from converter.decompose import Spectrum
from converter.errors import StiefelError
from converter.knapsack import cheapest, fill, spend
from converter.settings import Settings

TOLERANCE = 0.01  # a budget is met within this fraction of the whole model's cost


class Fixed(Settings):
    """The same rank in every layer that it makes smaller."""

    rank: int = Field(description="rank of every layer", ge=1)

    def __str__(self) -> str:
        return str(self.rank)


class Fraction(Settings):
    """A fraction of each layer's full rank, rounded, at least 1."""

    fraction: float = Field(description="fraction of each layer's full rank", gt=0, le=1)

    def __str__(self) -> str:
        return str(self.fraction)


class Energy(Settings):
    """The smallest rank that keeps a fraction of each layer's energy (squared singular values)."""

    energy: float = Field(description="fraction of each layer's energy to keep", gt=0, le=1)

    def __str__(self) -> str:
        return f"energy={self.energy}"


class Budget(Settings):
    """A fraction of the whole model's parameters, MACs or measured latency; give one of them."""

    params: float | None = Field(None, description="fraction of the parameters to keep", gt=0, le=1)
    macs: float | None = Field(None, description="fraction of the MACs to keep", gt=0, le=1)
    latency: float | None = Field(
        None, description="fraction of the latency, measured on this device, to keep", gt=0, le=1
    )

    @model_validator(mode="after")
    def _one_of_three(self) -> Budget:
        if sum(v is not None for v in (self.params, self.macs, self.latency)) != 1:
            raise ValueError("give exactly one of params, macs, latency")
        return self

    @property
    def cost(self) -> str:
        """Which cost is budgeted."""
        return next(k for k in ("params", "macs", "latency") if getattr(self, k) is not None)

    @property
    def fraction(self) -> float:
        """How much of it to keep."""
        return getattr(self, self.cost)

    def __str__(self) -> str:
        return f"{self.cost}={self.fraction}"


Policy = Fixed | Fraction | Energy | Budget


def parse_rank(text: Policy | str | int | float) -> Policy:
    """Read a rank policy as it is written on the command line.

    `32` is a rank, `0.25` a fraction of full rank, `energy=0.95` energy to keep, and `params=0.5`,
    `macs=0.5`, `latency=0.5` are budgets of the whole model.

    Raises:
        StiefelError: the text is none of these, or its number is out of range.
    """
    if isinstance(text, Policy):
        return text
    key, _, value = str(text).strip().rpartition("=")
    key, value = key.strip().lower(), value.strip()
    makers = {
        "": lambda: Fixed(rank=int(value)) if _is_integer(value) else Fraction(fraction=value),
        "rank": lambda: Fixed(rank=value),
        "fraction": lambda: Fraction(fraction=value),
        "energy": lambda: Energy(energy=value),
        **{k: lambda k=k: Budget(**{k: value}) for k in ("params", "macs", "latency")},
    }
    try:
        return makers[key]()
    except (KeyError, ValueError):
        raise StiefelError(
            f"rank '{text}' is not understood: give a rank of 1 or more (32), a fraction of full "
            "rank up to 1 (0.25), energy=0.95, params=0.5, macs=0.5 or latency=0.5"
        ) from None


@dataclass(frozen=True)
class Option:
    """One thing that can be done with a layer: loss is relative tail energy, 0 to 1."""

    scheme: str | None
    rank: int | None
    cost: float
    loss: float


def policy_rank(
    policy: Fixed | Fraction | Energy, full_rank: int, spectrum: Spectrum | None
) -> int:
    """The rank that a policy gives one layer, before asking whether it saves anything."""
    if isinstance(policy, Fixed):
        return policy.rank
    if isinstance(policy, Fraction):
        return max(1, round(policy.fraction * full_rank))
    tail = spectrum.errors().square().numpy()
    return int(np.argmax(tail <= 1 - policy.energy + 1e-12)) + 1


def meet_budget(
    options: Sequence[Sequence[Option]],
    budget: Budget,
    whole: float,
    rest: float,
    slack: float = TOLERANCE,
) -> list[Option]:
    """Choose one option per layer: least Σ loss for which Σ cost + rest stays within the budget.

    Args:
        options: per layer, everything that can be done with it, in any order.
        budget: the fraction of `whole` allowed; never exceeded.
        whole: cost of the whole model as it is.
        rest: what of it no option covers.
        slack: how much of it may be left unspent while there is something to gain.

    Raises:
        StiefelError: the budget is out of reach, or can't be met closely; says what can.
    """
    costs = [np.array([o.cost for o in layer]) / whole for layer in options]
    losses = [np.array([o.loss for o in layer]) for layer in options]
    target, base = budget.fraction, rest / whole

    def total(chosen: Sequence[int]) -> float:
        return base + sum(float(c[j]) for c, j in zip(costs, chosen, strict=True))

    chosen = cheapest(costs, losses, price=1e12)
    if total(chosen) > target + 1e-9:
        least = math.ceil(total(chosen) * 1e4) / 1e4
        raise StiefelError(
            f"{budget} is out of reach: with every layer at its smallest, {budget.cost}={least} "
            "is left"
        )
    low, high = -30.0, 30.0  # log of the price of cost
    for _ in range(60):
        middle = (low + high) / 2
        trial = cheapest(costs, losses, price=math.exp(middle))
        if total(trial) <= target + 1e-9:
            high, chosen = middle, trial
        else:
            low = middle
    chosen = spend(costs, losses, chosen, target - total(chosen))
    loss = sum(float(x[j]) for x, j in zip(losses, chosen, strict=True))
    if total(chosen) < target - slack and loss > 0:
        # Coarse options: look for a combination that comes nearer.
        chosen = fill(costs, losses, target - base) or chosen
    if total(chosen) < target - slack and loss > 0:
        raise StiefelError(
            f"{budget} cannot be met within {slack:.0%}: the nearest below is "
            f"{budget.cost}={math.ceil(total(chosen) * 1e4) / 1e4}"
        )
    return [layer[j] for layer, j in zip(options, chosen, strict=True)]


def _is_integer(text: str) -> bool:
    return text.lstrip("+-").isdigit()
