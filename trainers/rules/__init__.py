"""The learning rules behind one interface: `make_rule(SSA(...) | DFA(...) | BP(...)) -> Rule`."""

from trainers.rules.bp import BP, Backpropagation
from trainers.rules.interface import Rule, StepResult
from trainers.rules.settings import DFA, SSA, CutSettings

__all__ = ["BP", "DFA", "SSA", "CutSettings", "Rule", "RuleSettings", "StepResult", "make_rule"]

RuleSettings = SSA | DFA | BP


def make_rule(settings: RuleSettings) -> Rule:
    """The rule that these settings describe."""
    if isinstance(settings, BP):
        return Backpropagation(settings)
    raise NotImplementedError(settings.name)
