"""Where a layer's output goes: into a batch norm, and into a sum with what went around it.

Read from a `torch.fx` trace. Calibration can do without: a model that can't be traced is run as it
is, and its layers are then fitted one by one, by their own outputs only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from converter.cost import inference

_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_SILENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)  # in evaluation mode
BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Residual:
    """A sum that ends a branch.

    Attributes:
        shortcut: the graph node whose value is added to the branch.
        norm: the batch norm between the branch's last layer and the sum, or None.
    """

    shortcut: str
    norm: str | None


@dataclass(frozen=True)
class Flow:
    """A model's graph, and what it says of the layers asked for; empty where there is none.

    Attributes:
        graph: the model's, with every shortcut computed before the last layer of its branch.
        residuals: by the last layer of the branch.
        normed: layers whose output goes into a batch norm and nowhere else.
    """

    graph: fx.Graph | None = None
    residuals: Mapping[str, Residual] = field(default_factory=dict)
    normed: frozenset[str] = frozenset()


def trace(model: nn.Module, layers: Iterable[str], example: Tensor) -> Flow:
    """The flow of a model, or an empty one where it can't be traced faithfully.

    Args:
        model: is only run.
        layers: names of the layers of interest.
        example: (N, C, H, W); the trace must give what the model gives for the first two.
    """
    with inference(model):
        try:
            flow = _read(model, set(layers))
            want = model(example[:2])
            got = fx.Interpreter(model, graph=flow.graph).run(example[:2])
            torch.testing.assert_close(got, want)
        except Exception:  # whatever a model's own code raises when it is traced
            return Flow()
    return flow


def _read(model: nn.Module, layers: set[str]) -> Flow:
    attributes = set(vars(model))
    graph = fx.Tracer().trace(model)
    if set(vars(model)) - attributes:
        raise ValueError("tracing made constants of this model, which a copy of it lacks")
    modules = dict(model.named_modules())
    at = {node: place for place, node in enumerate(graph.nodes)}
    residuals: dict[str, Residual] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or node.target not in _SUMS:
            continue
        terms = [term for term in node.args[:2] if isinstance(term, fx.Node)]
        branches = [_branch(term, modules, layers) for term in terms]
        if len(terms) < 2 or not any(branches):
            continue
        # Where both terms end in a layer, the later one makes up for the earlier.
        last = max((b for b in branches if b), key=lambda branch: at[branch[0]])
        layer, norm = last
        shortcut = terms[1 - branches.index(last)]
        if _compute_before(shortcut, layer, at):
            residuals[layer.target] = Residual(shortcut.name, norm)
    graph.lint()
    normed = frozenset(
        node.target
        for node in graph.nodes
        if _is_layer(node, layers)
        and node.users
        and all(isinstance(_module(user, modules), BatchNorm) for user in node.users)
    )
    return Flow(graph, residuals, normed)


def _branch(
    node: fx.Node, modules: Mapping[str, nn.Module], layers: set[str]
) -> tuple[fx.Node, str | None] | None:
    """(layer, batch norm's name) that a term of a sum comes from, if from nothing else."""
    norm = None
    while len(node.users) == 1:
        if _is_layer(node, layers):
            return node, norm
        module = _module(node, modules)
        if isinstance(module, BatchNorm) and module.running_var is not None and norm is None:
            norm = node.target
        elif not isinstance(module, _SILENT):
            return None
        node = node.args[0]
    return None


def _compute_before(shortcut: fx.Node, layer: fx.Node, at: Mapping[fx.Node, int]) -> bool:
    """Move what the shortcut needs in front of the layer; False if it needs the layer itself."""
    needed, waiting = {shortcut}, [shortcut]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                waiting.append(node)
    if layer in needed:
        return False
    for node in sorted((n for n in needed if at[n] > at[layer]), key=at.__getitem__):
        layer.prepend(node)
    return True


def _is_layer(node: fx.Node, layers: set[str]) -> bool:
    return node.op == "call_module" and node.target in layers


def _module(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules.get(node.target) if node.op == "call_module" else None
