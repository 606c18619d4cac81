"""One option per layer, of least loss within a cost: the arithmetic behind a budget.

Everywhere `costs` and `losses` hold one array per layer, (options,) each.
"""

from collections.abc import Sequence

import numpy as np

CELLS = 20_000  # costs are rounded up to so many parts of the budget
NEAR = CELLS // 200  # parts that make no difference


def cheapest(costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], price: float) -> list[int]:
    """Per layer the option of least loss + price · cost; of equals the cheaper."""
    pairs = zip(costs, losses, strict=True)
    return [int(np.lexsort((c, x + price * c))[0]) for c, x in pairs]


def spend(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], chosen: Sequence[int], left: float
) -> list[int]:
    """Spend what a choice leaves over: the best loss saved per cost that still fits, first."""
    chosen = list(chosen)
    while True:
        best, move = 0.0, None
        for i, (c, x) in enumerate(zip(costs, losses, strict=True)):
            extra = c - c[chosen[i]]
            gain = np.where((extra <= left) & (extra > 0), x[chosen[i]] - x, 0.0)
            rate = gain / np.maximum(extra, 1e-12)
            j = int(rate.argmax())
            if rate[j] > best:
                best, move = float(rate[j]), (i, j, float(extra[j]))
        if move is None:
            return chosen
        chosen[move[0]] = move[1]
        left -= move[2]


def fill(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], budget: float
) -> list[int] | None:
    """A choice of greatest cost within the budget, and of near equals the one of least loss.

    By dynamic programming over costs in parts of the budget, rounded up.
    """
    parts = [np.ceil(c / budget * CELLS).astype(int) for c in costs]
    best = np.full(CELLS + len(parts) + 1, np.inf)  # as much as rounding may add
    best[0] = 0.0
    taken = []
    for part, loss in zip(parts, losses, strict=True):
        following, choice = np.full_like(best, np.inf), np.full(len(best), -1)
        for j in np.flatnonzero(part < len(best)):
            trial = np.full_like(best, np.inf)
            trial[part[j] :] = best[: len(best) - part[j]] + loss[j]
            better = trial < following
            following[better], choice[better] = trial[better], j
        best = following
        taken.append(choice)
    reached = np.flatnonzero(np.isfinite(best))
    for cell in reached[np.lexsort((best[reached], -(reached // NEAR)))]:
        chosen = _trace(parts, taken, int(cell))
        if sum(c[j] for c, j in zip(costs, chosen, strict=True)) <= budget + 1e-9:
            return chosen
    return None


def _trace(parts: Sequence[np.ndarray], taken: Sequence[np.ndarray], cell: int) -> list[int]:
    """The options whose costs add up to a cell."""
    chosen = []
    for part, choice in zip(reversed(parts), reversed(taken), strict=True):
        chosen.append(int(choice[cell]))
        cell -= int(part[chosen[-1]])
    return chosen[::-1]
