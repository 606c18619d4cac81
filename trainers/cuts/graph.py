"""A network as a `torch.fx` graph, with what each node yields on an example."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from converter.attention import FactoredAttention
from converter.errors import StiefelError, first_line
from converter.factors import Factored, FactoredWeight
from trainers.looking import in_mode, undisturbed
from trainers.randomness import host_state

ATTENTION = (nn.MultiheadAttention, FactoredAttention)
# Taken whole; norms and dropout, and what derives from them, so that they follow their mode.
WHOLE = (Factored, *ATTENTION, _NormBase, _DropoutNd)
WEIGHTED = (Factored, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRACE_ADVICE = "name the submodules that are to be its blocks, by glob, under `blocks`"


@dataclass(frozen=True)
class Traced:
    """A traced network: the graph, the opaque submodules, and what the nodes yielded.

    Attributes:
        graph: the forward pass; `call_module` targets are names in the network.
        module: executes `graph`; shares every submodule and parameter with the network.
        opaque: names of the submodules that had to be taken whole.
        values: node → what it yielded on the example (tensors on the meta device).
        writes: node → the nodes whose tensors it writes into.
    """

    graph: fx.Graph
    module: fx.GraphModule
    opaque: frozenset[str]
    values: dict[fx.Node, Any]
    writes: dict[fx.Node, set[fx.Node]]


def trace(
    network: nn.Module, example: Tensor, opaque: frozenset[str] = frozenset(), training: bool = True
) -> Traced:
    """Trace `network` as it runs in training (or evaluation) mode.

    A submodule whose forward cannot be traced, which draws at random or keeps something of its
    batch outside the graph, or which reads a factored layer's `.weight`, is taken whole; the
    innermost such module is. What functions are told of `self.training` is fixed here: `F.dropout`
    stays as it is in this mode; so are the defaults of all arguments but the images.

    Args:
        network: left as it was, training mode included.
        example: (N, C, H, W); one image of it is used.
        opaque: submodules to take whole from the outset.
        training: which mode's graph.

    Raises:
        StiefelError: the network's own forward, outside every submodule, cannot be traced.
    """
    with undisturbed(network), in_mode(network, training):
        tracer, graph = _trace(network, opaque)
    # Constants that the tracer left on the network belong to the graph alone.
    module = fx.GraphModule(network, graph)
    for name in tracer.tensor_attrs.values():
        if name.startswith("_tensor_constant"):
            network.__dict__.pop(name, None)
    with undisturbed(network), in_mode(network, False), torch.no_grad():
        # Three images: dimensions of size three are rare, so the batch's can be told from others.
        images = example[:1].expand(3, *example.shape[1:]).contiguous()
        recorder = _Recorder(module)
        recorder.run(images)
    _read_what_was_written(graph, recorder)
    return Traced(graph, module, tracer.opaque, recorder.seen, recorder.writes)


def _trace(network: nn.Module, opaque: frozenset[str]) -> tuple["_Tracer", fx.Graph]:
    while True:
        tracer = _Tracer(opaque)
        try:
            return tracer, tracer.trace(network)
        except Exception as error:
            if tracer.culprit is None or tracer.culprit in opaque:
                reason = first_line(error)
                raise StiefelError(
                    f"{type(network).__name__} cannot be traced ({reason}); {TRACE_ADVICE}"
                ) from error
            opaque = opaque | {tracer.culprit}


class _Tracer(fx.Tracer):
    """Takes some modules whole, and remembers where tracing failed."""

    def __init__(self, opaque: frozenset[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.culprit: str | None = None

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
        raise TypeError("its forward draws at random, or changes a buffer")


class _Recorder(fx.Interpreter):
    """Runs a graph once and keeps the shape of everything, and what is written into.

    Attributes:
        seen: node → its value, tensors on the meta device.
        writes: node → nodes whose tensors it wrote into.
        same: node → those among them whose tensor it also returned.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}
        self.writes: dict[fx.Node, set[fx.Node]] = {}
        self.same: dict[fx.Node, set[fx.Node]] = {}

    def run_node(self, n: fx.Node) -> Any:
        tensors = {m: v for m, v in self.env.items() if isinstance(v, Tensor)}
        versions = {m: v._version for m, v in tensors.items()}
        value = super().run_node(n)
        module = self.fetch_attr(n.target) if n.op == "call_module" else None
        if isinstance(module, _DropoutNd) and not module.inplace:
            value = value.clone()  # in training it is another tensor than what came in
        self.writes[n] = {m for m, v in tensors.items() if v._version != versions[m]}
        # What writes in training alone, as dropout does, says so.
        if getattr(module, "inplace", False):
            self.writes[n].update(n.all_input_nodes[:1])
        self.same[n] = {m for m in self.writes[n] if _is_same(tensors[m], value)}
        self.seen[n] = fx.node.map_aggregate(
            value, lambda v: v.detach().to("meta") if isinstance(v, Tensor) else v
        )
        return value


def _is_same(tensor: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_set_to(tensor)


def _read_what_was_written(graph: fx.Graph, recorder: _Recorder) -> None:
    """Let later nodes read a tensor from the node that wrote into it last.

    `h.add_(y)` as a statement leaves them at `h`, and where `h` comes from seems to be all that
    they depend on.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        for written in recorder.same.get(node, ()):
            written.replace_all_uses_with(node, lambda user, at=order[node]: order[user] > at)


def weighted_layers(module: nn.Module) -> int:
    """How many layers that mix channels are in this module; an attention counts once.

    Depthwise convolutions do not mix channels, and are left to the block where they stand.
    """
    if isinstance(module, ATTENTION):
        return 1
    if isinstance(module, WEIGHTED):
        return int(getattr(module, "groups", 1) == 1 or isinstance(module, Factored))
    return sum(weighted_layers(child) for child in module.children())


def is_float(value: Any) -> bool:
    """Whether it is a float tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def body(graph: fx.Graph) -> list[fx.Node]:
    """The nodes but the output."""
    return [node for node in graph.nodes if node.op != "output"]


def constant_nodes(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes that do not depend on the input: every block computes those that it needs."""
    fixed: set[fx.Node] = set()
    for node in nodes:
        if node.op != "placeholder" and all(n in fixed for n in node.all_input_nodes):
            fixed.add(node)
    return fixed


def attributes_behind(node: fx.Node) -> list[fx.Node]:
    """The parameters and buffers that a constant node is made from."""
    if node.op == "get_attr":
        return [node]
    return [found for before in node.all_input_nodes for found in attributes_behind(before)]


def live_nodes(graph: fx.Graph) -> list[list[fx.Node]]:
    """For each place of the body, the nodes made there or before and used after; no constants."""
    nodes = body(graph)
    fixed = constant_nodes(nodes)
    order = {node: place for place, node in enumerate(graph.nodes)}
    last_use = {node: max((order[user] for user in node.users), default=-1) for node in nodes}
    live: list[list[fx.Node]] = []
    now: list[fx.Node] = []
    for place, node in enumerate(nodes):
        if node not in fixed:
            now = [*now, node]
        now = [n for n in now if last_use[n] > place]
        live.append(now)
    return live
