"""Which batch norm can go into the layer before it, as a trace of the model shows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn
from torch.nn.utils import parametrize

from converter.factors import Factored
from converter.layers import install

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Calls:
    """What a model's forward pass uses, and how.

    Attributes:
        graph: of `torch.fx`; factored layers and attention are leaves.
        called: how often each module is called, by the first of its names.
        read: modules whose tensors the model reads instead of calling them, likewise.
    """

    graph: fx.Graph
    called: dict[str, int]
    read: frozenset[str]


class _Tracer(fx.Tracer):
    """Descends into everything but torch's own layers and ours."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = ("converter.factors", "converter.attention")
        return type(m).__module__ in ours or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> Calls | None:
    """The model's graph, or None where Python control flow or the like can't be traced."""
    try:
        graph = _Tracer().trace(model)
    except Exception:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    called: dict[str, int] = {}
    read: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            name = names[id(model.get_submodule(node.target))]
            called[name] = called.get(name, 0) + 1
        elif node.op == "get_attr":
            read.add(names[id(model.get_submodule(node.target.rpartition(".")[0]))])
    return Calls(graph, called, frozenset(read))


def folds(model: nn.Module, calls: Calls | None) -> dict[str, str]:
    """Layer name to the name of the batch norm that is the only user of its output."""
    found: dict[str, str] = {}
    for node in calls.graph.nodes if calls else ():
        if node.op != "call_module" or not node.args or len(node.all_input_nodes) != 1:
            continue
        before = node.all_input_nodes[0]
        if before.op != "call_module" or len(before.users) != 1:
            continue
        both = (before.target, node.target)
        once = all(calls.called.get(name) == 1 and name not in calls.read for name in both)
        layer, norm = model.get_submodule(before.target), model.get_submodule(node.target)
        if once and _foldable(layer) and _plain(norm):
            found[before.target] = node.target
    return found


def _foldable(layer: nn.Module) -> bool:
    if parametrize.is_parametrized(layer):
        return False
    return isinstance(layer, Factored) or type(layer) in _FOLDABLE


def _plain(norm: nn.Module) -> bool:
    # A subclass may do more than normalise (timm's adds the activation).
    return type(norm) in _BATCH_NORMS and norm.running_mean is not None


def without_folded_norms(model: nn.Module) -> nn.Module:
    """Take out the batch norms that inference folds away; in place, for timing only."""
    gone = folds(model, trace(model)).values()
    return install(model, {name: nn.Identity() for name in gone})
