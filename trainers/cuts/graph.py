"""A network as a `torch.fx` graph, with what each node yields on an example."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from converter.factors import Factored
from trainers.cuts.tracer import ATTENTION, IMPURE, UntraceableError, refusal, symbolic
from trainers.looking import in_mode, undisturbed

# Dimensions of size three are rare, so that of so many images can be told from others.
IMAGES = 3
WEIGHTED = (Factored, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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

    A submodule whose forward a graph cannot tell is taken whole, the innermost such module: one
    that cannot be traced, that draws at random, keeps something of its batch in a buffer or goes by
    a number that it counts, that runs a part without gradients or in a precision of its own, or
    that reads a factored layer's `.weight`. What functions are told of `self.training` is fixed
    here: `F.dropout` stays as it is in this mode; so are the defaults of all arguments but the
    images.

    Args:
        network: left as it was, training mode included.
        example: (N, C, H, W); one image of it is used.
        opaque: submodules to take whole from the outset.
        training: which mode's graph.

    Raises:
        StiefelError: a graph cannot tell the network's own forward, outside every submodule.
    """
    while True:
        try:
            return _trace(network, example, opaque, training)
        except UntraceableError as error:
            if not error.culprit or error.culprit in opaque:
                raise refusal(network, error) from error
            opaque = opaque | {error.culprit}


def _trace(network: nn.Module, example: Tensor, opaque: frozenset[str], training: bool) -> Traced:
    with undisturbed(network), in_mode(network, training):
        module = symbolic(network, opaque)
    recorder = _recorded(network, module, example, IMAGES)
    _check_kept(recorder.writes)
    _read_what_was_written(module.graph, recorder)
    return Traced(module.graph, module, opaque, recorder.seen, recorder.writes)


def values_of(traced: Traced, example: Tensor, images: int) -> dict[fx.Node, Any]:
    """`Traced.values` of another number of images than `IMAGES`."""
    return _recorded(traced.module, traced.module, example, images).seen


def _recorded(
    network: nn.Module, module: fx.GraphModule, example: Tensor, images: int
) -> "_Recorder":
    """What a network's graph does with so many copies of the example's first image."""
    with undisturbed(network), in_mode(network, False), torch.no_grad():
        recorder = _Recorder(module)
        recorder.run(example[:1].expand(images, *example.shape[1:]).contiguous())
    return recorder


def _check_kept(writes: Mapping[fx.Node, set[fx.Node]]) -> None:
    """Refuse a graph that writes into what the network holds: each block reads that for itself.

    Raises:
        UntraceableError: names the innermost module that writes.
    """
    for writer, written in writes.items():
        if any(node.op == "get_attr" for node in written):
            within = [*writer.meta.get("nn_module_stack", {}).values()]
            name = within[-1][0] if within else ""
            raise UntraceableError(IMPURE, name)


class _Recorder(fx.Interpreter):
    """Runs a graph once and keeps the shape of everything, and what is written into.

    Attributes:
        seen: node → its value, tensors on the meta device.
        writes: node → nodes whose tensors it wrote into, be it through a view of them.
        same: node → those among them whose tensor it also returned.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}
        self.writes: dict[fx.Node, set[fx.Node]] = {}
        self.same: dict[fx.Node, set[fx.Node]] = {}
        # node → nodes whose tensors share its memory, itself and such as are no longer held.
        self._sharing: dict[fx.Node, set[fx.Node]] = {}

    def run_node(self, n: fx.Node) -> Any:
        tensors = {m: v for m, v in self.env.items() if isinstance(v, Tensor)}
        versions = {m: v._version for m, v in tensors.items()}
        value = super().run_node(n)
        module = self.fetch_attr(n.target) if n.op == "call_module" else None
        if isinstance(module, _DropoutNd) and not module.inplace:
            value = value.clone()  # in training it is another tensor than what came in
        written = {m for m, v in tensors.items() if v._version != versions[m]}
        # What writes in training alone, as dropout does, says so.
        if getattr(module, "inplace", False):
            written.update(n.all_input_nodes[:1])
        self.writes[n] = set().union(*(self._sharing[m] for m in written))
        self.same[n] = {m for m in written if _is_same(tensors[m], value)}
        self._share(n, value)
        self.seen[n] = fx.node.map_aggregate(
            value, lambda v: v.detach().to("meta") if isinstance(v, Tensor) else v
        )
        return value

    def _share(self, n: fx.Node, value: Any) -> None:
        places = _places(value)
        sharing = {n}.union(
            *(self._sharing[m] for m, held in self.env.items() if places & _places(held))
        )
        for m in sharing:
            self._sharing[m] = sharing


def _places(value: Any) -> set[int]:
    """Where in memory its tensors are; empty ones are nowhere."""
    tensors = [v for v in tree_leaves(value) if isinstance(v, Tensor)]
    storages = [v.untyped_storage() for v in tensors if v.layout == torch.strided]
    return {storage.data_ptr() for storage in storages if storage.nbytes()}


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


def can_be_root(value: Any) -> bool:
    """Whether it is a float tensor with the images in front, of which a loss can be made."""
    return is_float(value) and value.ndim > 1 and value.shape[0] == IMAGES


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


def trained_nodes(nodes: list[fx.Node], fixed: set[fx.Node], traced: Traced) -> set[fx.Node]:
    """Those of these nodes that depend on a parameter that is read among them."""
    trained: set[fx.Node] = set()
    for node in nodes:
        if modules_run([node], traced) or any(
            n in trained or (n in fixed and attributes_behind(n)) for n in node.all_input_nodes
        ):
            trained.add(node)
    return trained


def modules_run(nodes: list[fx.Node], traced: Traced) -> list[str]:
    """Names of the submodules with parameters that these nodes run."""
    names = [str(node.target) for node in nodes if node.op == "call_module"]
    modules = [traced.module.get_submodule(name) for name in names]
    return [
        n for n, m in zip(names, modules, strict=True) if next(m.parameters(), None) is not None
    ]


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
