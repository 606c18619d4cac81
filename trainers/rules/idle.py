"""Settings that say nothing about the training at hand, which its user should know."""

from collections.abc import Iterator

import torch

from trainers.rules import SSA, RuleSettings
from trainers.rules.overlap import has_streams


def idle(rule: RuleSettings, device: torch.device, processes: int) -> Iterator[str]:
    """In one line each, what is set and changes nothing where this rule trains.

    Nothing is refused for it: a recipe for a GPU is tried on a CPU, and a study goes over values.
    """
    if not isinstance(rule, SSA):
        return
    if rule.overlap > 1 and not has_streams(device, processes):
        yield f"overlap {rule.overlap} is for one GPU and one process: blocks are trained in turn"
    if rule.storage == "recomputed" and rule.error == "layerwise" and not rule.lookahead:
        yield "storage recomputed is for error global or a lookahead: nothing is stored here anyway"
