"""The learning rules behind one interface: `make_rule(SSA(...) | DFA(...) | BP(...)) -> Rule`."""

from converter.errors import StiefelError
from trainers.rules.bp import BP, Backpropagation
from trainers.rules.dfa import DirectFeedback
from trainers.rules.interface import Rule, StepResult
from trainers.rules.settings import DFA, SSA, CutSettings
from trainers.rules.ssa import SVDSpaceAlignment

__all__ = ["BP", "DFA", "SSA", "CutSettings", "Rule", "RuleSettings", "StepResult", "make_rule"]

RuleSettings = SSA | DFA | BP

_RULES = {SSA: SVDSpaceAlignment, DFA: DirectFeedback, BP: Backpropagation}


def make_rule(settings: RuleSettings) -> Rule:
    """The rule that these settings describe.

    Raises:
        StiefelError: they are no rule's.
    """
    if type(settings) not in _RULES:
        raise StiefelError(f"rule {settings!r} is none: give SSA(...), DFA(...) or BP()")
    return _RULES[type(settings)](settings)
