"""Ranks that meet a budget of the whole model: parameters, multiply-accumulates, measured time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from converter import ranks
from converter.errors import StiefelError
from converter.latency import LatencyPrices
from converter.layers import Layer
from converter.prices import Prices
from converter.ranks import Budget, Option
from converter.requests import Request
from converter.spectra import Decomposer, Progress

LATENCY_ROUNDS = 5
LATENCY_TOLERANCE = 0.03  # of the time asked for: measurements are no closer than that
ROUNDING = 1e-12  # relative energy that is below float32's own


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer; without a rank it is kept, for a reason."""

    scheme: str | None
    rank: int | None
    reason: str | None = None


@dataclass(frozen=True)
class Menu:
    """What a budget can be met with.

    Attributes:
        layers: those that own a weight.
        requests: what is asked of each, by name.
        decided: those whose fate does not depend on the budget, by name.
        decompose: gives their spectra.
        progress: called with ("price", layers done, layers).
        weights: what each layer's relative loss counts, by name; 1 where not given.
    """

    layers: Sequence[Layer]
    requests: Mapping[str, Request]
    decided: Mapping[str, Decision]
    decompose: Decomposer
    progress: Progress | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    def options(self, prices: Prices) -> list[list[Option]]:
        """What can be done with each layer; those decided already have one option only."""
        options = []
        for done, layer in enumerate(self.layers):
            if self.progress:
                self.progress("price", done, len(self.layers))
            if layer.name in self.decided:
                options.append([_only_option(layer, self.decided[layer.name], prices)])
            else:
                request = self.requests[layer.name]
                weight = self.weights.get(layer.name, 1.0)
                options.append(_options(layer, request, prices, self.decompose, weight))
        return options

    def decisions(
        self, options: Sequence[Sequence[Option]], chosen: Sequence[Option]
    ) -> dict[str, Decision]:
        """The chosen options as decisions, those decided before as they were."""
        made = {
            layer.name: Decision(one.scheme, one.rank, None if one.rank else _reason(among))
            for layer, one, among in zip(self.layers, chosen, options, strict=True)
        }
        return made | dict(self.decided)


def by_budget(policy: Budget, menu: Menu, prices: Prices) -> dict[str, Decision]:
    """What becomes of every layer under a budget on parameters or MACs."""
    options = menu.options(prices)
    rest = prices.whole - sum(prices.current(layer) for layer in menu.layers)
    return menu.decisions(options, ranks.meet_budget(options, policy, prices.whole, rest))


def by_latency(
    policy: Budget, menu: Menu, prices: LatencyPrices
) -> tuple[dict[str, Decision], dict[str, float]]:
    """What becomes of every layer under a latency budget, and what both models took, in ms.

    Layers timed one by one add up to the model but roughly, so the planned model is timed whole,
    in turns with the dense one, and the next plan counts on as much of the sum's savings as came
    true. Of several measurements one meets the budget by luck: a plan that does is timed again.

    Raises:
        StiefelError: no plan was fast enough; says how fast the fastest was.
    """
    options = menu.options(prices)
    dense = sum(prices.current(layer) for layer in menu.layers)
    saving = (1 - policy.fraction) * prices.whole
    came_true = 1.0
    tried: list[tuple[float, dict[str, Decision]]] = []
    allowed = LATENCY_TOLERANCE * policy.fraction
    for _ in range(LATENCY_ROUNDS):
        rest = policy.fraction * prices.whole - dense + saving / came_true
        least = sum(min(option.cost for option in layer) for layer in options)
        if out_of_reach := rest + least > policy.fraction * prices.whole:
            # By the sum of layers; the model itself may be faster.
            chosen = [min(layer, key=lambda option: option.cost) for layer in options]
        else:
            chosen = ranks.meet_budget(options, policy, prices.whole, rest, slack=1.0)
        decisions = menu.decisions(options, chosen)
        if any(decisions == before for _, before in tried):
            break  # the ranks on offer come no nearer
        planned = {name: (d.scheme, d.rank) for name, d in decisions.items() if d.rank}
        reached = prices.measured(planned)
        if near := abs(reached - policy.fraction) <= allowed:
            reached = prices.measured(planned)
        tried.append((reached, decisions))
        if near and abs(reached - policy.fraction) <= allowed:
            break
        if out_of_reach and reached > policy.fraction:
            break
        if (promised := dense - sum(option.cost for option in chosen)) <= 0:
            break
        found = (1 - reached) * prices.whole / promised
        came_true = min(max(found, came_true / 2), came_true * 2)
    fast = [one for one in tried if one[0] <= policy.fraction + allowed]
    if not fast:
        fastest = min(reached for reached, _ in tried)
        raise StiefelError(f"{policy} is out of reach: the fastest plan took latency={fastest:.2f}")
    reached, decisions = min(fast, key=lambda one: abs(one[0] - policy.fraction))
    dense_ms = prices.whole * 1e3
    return decisions, {"dense_latency_ms": dense_ms, "factored_latency_ms": reached * dense_ms}


def _only_option(layer: Layer, decision: Decision, prices: Prices) -> Option:
    scheme, rank = decision.scheme, decision.rank
    price = prices.current(layer) if rank is None else prices.factored(layer, scheme, rank)
    return Option(scheme, rank, price, 0.0)


def _options(
    layer: Layer, request: Request, prices: Prices, decompose: Decomposer, weight: float
) -> list[Option]:
    """Keeping the layer first, then every rank of every scheme that costs less."""
    options = [Option(request.schemes[0], None, prices.current(layer), 0.0)]
    for scheme in request.schemes:
        loss = weight * decompose(layer, scheme).errors().square()
        loss[loss < ROUNDING] = 0.0  # else a budget would be spent on noise
        for rank in prices.ranks(layer, scheme):
            price = prices.factored(layer, scheme, rank)
            if price < options[0].cost and rank <= len(loss):
                options.append(Option(scheme, rank, price, float(loss[rank - 1])))
    return options


def _reason(options: Sequence[Option]) -> str:
    if len(options) == 1:
        return "factoring would save nothing"
    return "within the budget, factoring other layers loses less"
