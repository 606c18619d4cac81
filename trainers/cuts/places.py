"""Where to cut a traced network: between residual units, or after every layer."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from trainers.cuts.blocks import CutSettings
from trainers.cuts.graph import (
    Traced,
    attributes_behind,
    body,
    can_be_root,
    constant_nodes,
    is_float,
    live_nodes,
    trained_nodes,
    weighted_layers,
)

# A unit without an inner single-tensor place (a DenseNet's dense block) is cut all the same when
# it holds more layers than the largest residual or inception unit has.
_LARGEST_UNIT = 10


@dataclass(frozen=True)
class Segment:
    """The nodes start..end-1 of a graph's body, one block's.

    `hidden` is where the cut would have been that the output head was joined across.
    """

    start: int
    end: int
    name: str
    layers: tuple[str, ...]
    hidden: int | None = None


def choose_ends(traced: Traced, settings: CutSettings) -> list[int]:
    """The places at which to cut, the output head's own included if it has one."""
    places, size = _Places(traced), settings.layers_per_block
    if settings.boundaries == "layers":
        return places.group(0, len(places), size, None)
    units = places.group(0, len(places), 1, width=1)
    for start, end in list(pairwise([0, *units, len(places)])):
        if places.count(start, end) > _LARGEST_UNIT:
            units += places.group(start, end, 2, None)
    return places.join(sorted(units), size)


def make_segments(traced: Traced, ends: list[int]) -> list[Segment]:
    """Blocks between these places; an output head alone at the end joins the block before it."""
    places = _Places(traced)
    stops = [0, *ends, len(places)]
    hidden = None
    if len(stops) > 2 and places.count(stops[-2], stops[-1]) == 1:
        # The output head alone would train on features that nothing shapes for it.
        hidden = stops.pop(-2)
    shaping = [*stops[:-1], hidden or stops[-1]]
    names = _block_names([places.names(start, end) for start, end in pairwise(shaping)])
    blocks = [
        Segment(start, end, name, places.names(start, end))
        for (start, end), name in zip(pairwise(stops), names, strict=True)
    ]
    return [*blocks[:-1], replace(blocks[-1], hidden=hidden)]


def _block_names(blocks: list[tuple[str, ...]]) -> list[str]:
    """Each block's innermost common module, or its first and last layers where others share it."""
    everything = [layer for layers in blocks for layer in layers]
    names = []
    for layers in blocks:
        shared = _common_module(layers)
        within = [layer for layer in everything if f"{layer}.".startswith(f"{shared}.")]
        ends = layers[0] if layers else "network"
        ends = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else ends
        names.append(shared if shared and len(within) == len(layers) else ends)
    return told_apart(names)


def told_apart(names: Iterable[str]) -> list[str]:
    """The names, with a number behind those that came before: shared layers are several blocks'."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(f"{name}:{seen[name]}" if seen[name] > 1 else name)
    return numbered


def _common_module(layers: tuple[str, ...]) -> str:
    """The longest dotted prefix of all the names."""
    shared = []
    for parts in zip(*(layer.split(".") for layer in layers), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _used(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the output depends on."""
    used: set[fx.Node] = set()
    stack = [node for node in graph.nodes if node.op == "output"]
    while stack:
        node = stack.pop()
        if node not in used:
            used.add(node)
            stack += node.all_input_nodes
    return used


class _Places:
    """What each place of the graph offers for cutting."""

    def __init__(self, traced: Traced) -> None:
        self.nodes = body(traced.graph)
        self.values = traced.values
        self._fixed, self._used = constant_nodes(self.nodes), _used(traced.graph)
        self.layers = [self._weighted(node, traced) for node in self.nodes]
        live = live_nodes(traced.graph)
        trained = trained_nodes(self.nodes, self._fixed, traced)
        self.width = [sum(can_be_root(self.values[n]) for n in now) for now in live]
        self.able = [self._can_cut(now, trained) for now in live]
        for place in self._shared(traced):
            self.able[place] = False

    def __len__(self) -> int:
        return len(self.nodes)

    def _can_cut(self, live: list[fx.Node], trained: set[fx.Node]) -> bool:
        """Whether a loss can be made of all that is trained before this place and used after."""
        values = [self.values[n] for n in live]
        packed = [leaf for v in values if not isinstance(v, Tensor) for leaf in tree_leaves(v)]
        if any(isinstance(leaf, Tensor) for leaf in packed):
            return False
        losing = [n for n in live if is_float(self.values[n]) and not can_be_root(self.values[n])]
        return any(map(can_be_root, values)) and trained.isdisjoint(losing)

    def _shared(self, traced: Traced) -> Iterator[int]:
        """Places where a tensor is live of which a part is yet to be written, and then read."""
        order = {node: place for place, node in enumerate(self.nodes)}
        for writer, written in traced.writes.items():
            for node in written:
                if any(order.get(user, len(self)) > order[writer] for user in node.users):
                    yield from range(order[node], order[writer])

    def _weighted(self, node: fx.Node, traced: Traced) -> int:
        """How many layers that mix channels this node runs; none where nothing comes of it."""
        if node not in self._used or node in self._fixed:
            return 0
        if node.op == "call_module":
            return weighted_layers(traced.module.get_submodule(node.target))
        # A function that takes layers' weights, as Swin's attention does, counts as one layer.
        return int(bool(self._weights(node)))

    def _weights(self, node: fx.Node) -> list[str]:
        """Names of the layers' weights that a function takes, as they are or standardised."""
        if node.op != "call_function" or node in self._fixed:
            return []
        arguments = [n for n in node.all_input_nodes if n in self._fixed]
        behind = dict.fromkeys(a for n in arguments for a in attributes_behind(n))
        # Those of norms are vectors, and mix nothing.
        matrices = [str(a.target) for a in behind if self.values[a].ndim > 1]
        return [name for name in matrices if name.endswith(".weight")]

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        weights = self._weights(node)
        return _common_module(tuple(name.removesuffix(".weight") for name in weights))

    def count(self, start: int, end: int) -> int:
        """Weighted layers in start..end-1."""
        return sum(self.layers[start:end])

    def names(self, start: int, end: int) -> tuple[str, ...]:
        """Names of the weighted layers in start..end-1."""
        names = [self._name(self.nodes[i]) for i in range(start, end) if self.layers[i]]
        return tuple(dict.fromkeys(names))

    def follows(self, place: int) -> bool:
        """Whether the node finishes what the node before it began: a norm, activation, addition."""
        node = self.nodes[place]
        value = self.values[node]
        return (
            self.layers[place] == 0
            and isinstance(value, Tensor)
            and any(
                isinstance(self.values[n], Tensor) and self.values[n].shape == value.shape
                for n in node.all_input_nodes
            )
            and self.able[place]
            and self.width[place] <= self.width[place - 1]
        )

    def group(self, start: int, end: int, size: int, width: int | None) -> list[int]:
        """Ends of blocks of `size` layers in start..end-1, with at most `width` live tensors."""
        ends, count, place = [], 0, start
        while place < end - 1:
            count += self.layers[place]
            if count >= size and self.able[place] and self.width[place] <= (width or len(self)):
                while place + 1 < end - 1 and self.follows(place + 1):
                    place += 1
                ends.append(place + 1)
                count = 0
            place += 1
        if ends and not self.count(ends[-1], end):
            ends.pop()
        return ends

    def join(self, ends: list[int], size: int) -> list[int]:
        """Those of these ends that leave at least `size` layers to every block but the last."""
        kept = [0]
        for end in ends:
            if self.count(kept[-1], end) >= size:
                kept.append(end)
        return kept[1:]
