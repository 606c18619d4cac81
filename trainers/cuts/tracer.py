"""Symbolic tracing: what a graph can tell becomes its nodes, other submodules are taken whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from converter.attention import FactoredAttention
from converter.errors import StiefelError, first_line
from converter.factors import Factored, FactoredWeight
from trainers.looking import numbers_of, plain_tensors
from trainers.randomness import host_state

ATTENTION = (nn.MultiheadAttention, FactoredAttention)
# Taken whole; norms and dropout, and what derives from them, so that they follow their mode.
WHOLE = (Factored, *ATTENTION, _NormBase, _DropoutNd)
TRACE_ADVICE = "name the submodules that are to be its blocks, by glob, under `blocks`"

IMPURE = "its forward draws at random, or changes a buffer"


class UntraceableError(Exception):
    """Why a graph cannot tell a forward; `culprit` is the innermost module whose it is, or ''."""

    def __init__(self, reason: str, culprit: str) -> None:
        super().__init__(reason)
        self.culprit = culprit


def symbolic(network: nn.Module, opaque: frozenset[str]) -> fx.GraphModule:
    """The graph of the forward, in the mode that the network is in, with some modules whole.

    Args:
        network: left as it was, but for buffers and random numbers.
        opaque: names of submodules to take whole, besides those of `WHOLE`.

    Raises:
        UntraceableError: the graph would not do what the forward does.
    """
    with _attributes_kept(network):
        graph, counted = _graph(network, opaque)
        module = fx.GraphModule(network, graph)  # holds the constants that the tracer made
        # Numbers that modules count for themselves are harmless where the graph is the same.
        _drop_constants(network)
        if counted and str(_graph(network, opaque)[0]) != str(graph):
            culprit = max(counted, key=len)
            raise UntraceableError("its forward goes by a number that it changes", culprit)
    return module


def refusal(network: nn.Module, error: UntraceableError) -> StiefelError:
    """What the user is told of a network whose own forward cannot be traced."""
    return StiefelError(
        f"{type(network).__name__} cannot be traced ({first_line(error)}); {TRACE_ADVICE}"
    )


def _graph(network: nn.Module, opaque: frozenset[str]) -> tuple[fx.Graph, list[str]]:
    """The graph, and the names of the modules that changed a number meanwhile."""
    tracer, uses = _Tracer(opaque), _Uses()
    before, held = numbers_of(network), _held_by(network)
    try:
        # In gradient mode, so that parts without gradients can be told.
        with torch.enable_grad(), _no_precision_of_its_own(), uses:
            graph = tracer.trace(network)
    except Exception as error:
        raise UntraceableError(first_line(error), tracer.culprit) from error
    for name in _rewritten(network, held):
        if id(held[name]) in uses.seen:
            owner = name.rpartition(".")[0]
            raise UntraceableError("its forward goes by a tensor that it changes", owner)
    after = numbers_of(network)
    names = {module: name for name, module in network.named_modules()}
    return graph, [names[module] for module in before if before[module] != after[module]]


class _Uses(TorchFunctionMode):
    """The ids of all tensors that take part in what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        self.seen.update(id(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        return function(*args, **kwargs)


def _held_by(network: nn.Module) -> dict[str, Tensor]:
    """Every plain tensor attribute, by its dotted name."""
    return {
        f"{prefix}.{name}".removeprefix("."): value
        for prefix, module in network.named_modules()
        for name, value in plain_tensors(module).items()
    }


def _rewritten(network: nn.Module, held: dict[str, Tensor]) -> list[str]:
    """Those of them that a forward has put another value in the place of."""
    now = ((name, name.rpartition(".")) for name in held)
    return [
        name
        for name, (owner, _, attribute) in now
        if vars(network.get_submodule(owner)).get(attribute) is not held[name]
    ]


def _drop_constants(network: nn.Module) -> None:
    for name in [name for name in vars(network) if name.startswith("_tensor_constant")]:
        delattr(network, name)


@contextmanager
def _attributes_kept(network: nn.Module) -> Iterator[None]:
    """Afterwards modules' attributes are as they were: a forward may put proxies in their place."""
    before = {module: dict(vars(module)) for module in network.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)


class _Tracer(fx.Tracer):
    """Takes some modules whole, and remembers where tracing failed."""

    def __init__(self, opaque: frozenset[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.culprit = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, WHOLE) or module_qualified_name in self.opaque
        return whole or super().is_leaf_module(m, module_qualified_name)

    def trace(self, root: nn.Module) -> fx.Graph:
        before = _kept_by(root)
        graph = super().trace(root)
        _check_pure(root, before)
        return graph

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        before = _kept_by(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
            _check_pure(m, before)
        except Exception:
            self.culprit = self.culprit or name
            raise
        return result

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> Any:
        if not torch.is_grad_enabled():
            # The graph would run this part with gradients, across cuts too.
            raise TypeError("a part of its forward runs without gradients")
        if kind != "placeholder" or not len(self.graph.nodes):
            return super().create_proxy(kind, target, args, kwargs, *rest, **more)
        # Only the images vary.
        if target.startswith("*"):
            return {} if target.startswith("**") else ()
        if not args:
            raise TypeError(f"its forward needs '{target}' beside the images")
        return args[0]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, FactoredWeight):
            # Traced through, the graph would hold on to factors that truncation replaces.
            raise TypeError("a factored weight is read outside its layer")
        return super().create_arg(a)


def _kept_by(module: nn.Module) -> tuple[Any, ...]:
    """What a forward changes that draws at random, or keeps something of its batch in a buffer."""
    buffers = [(id(buffer), buffer._version) for buffer in module.buffers()]
    return host_state(), buffers


def _check_pure(module: nn.Module, before: tuple[Any, ...]) -> None:
    # The graph would repeat this one draw for ever, and never keep anything again.
    if _kept_by(module) != before:
        raise TypeError(IMPURE)


@contextmanager
def _no_precision_of_its_own() -> Iterator[None]:
    """Meanwhile a forward that enters autocast fails: nothing of it would be in the graph."""

    def refuse(_: torch.autocast) -> None:
        raise TypeError("a part of its forward sets its own precision")

    entered = torch.autocast.__enter__
    torch.autocast.__enter__ = refuse
    try:
        yield
    finally:
        torch.autocast.__enter__ = entered
