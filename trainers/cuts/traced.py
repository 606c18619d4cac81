"""Running a traced network block by block, each block a graph of its own."""

from copy import copy
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from converter.errors import StiefelError
from trainers.cuts.blocks import Block, Visit, make_root
from trainers.cuts.graph import (
    IMAGES,
    Traced,
    body,
    can_be_root,
    constant_nodes,
    live_nodes,
    modules_run,
    trained_nodes,
    values_of,
)
from trainers.cuts.places import Segment
from trainers.cuts.walk import Few, Part, Walk


class TracedCuts:
    """A traced network cut into blocks, each a graph of its own over the network's modules.

    Args:
        traced: the whole network.
        segments: the places of the graph that make each block.
        roots: names of each block's roots; by default what is live at its cut.
    """

    def __init__(
        self,
        traced: Traced,
        segments: list[Segment],
        roots: list[tuple[str, ...]] | None = None,
    ) -> None:
        self.traced = traced
        self._few: Few | None = None
        self._segments = segments
        self._parts = _split(traced, segments, roots)
        self.blocks = tuple(
            Block(segment.name, segment.layers, part.roots, part.module)
            for segment, part in zip(segments, self._parts, strict=True)
        )

    def alike(self, traced: Traced) -> "TracedCuts":
        """Another network of the same structure, cut in the same places.

        Raises:
            StiefelError: a place or a root is missing there, or other layers stand between them.
        """
        own, other = body(self.traced.graph), body(traced.graph)
        places = {node.name: place for place, node in enumerate(other)}
        roots = [tuple(root.name for root in block.roots) for block in self.blocks]
        ends = [own[segment.end - 1].name for segment in self._segments[:-1]]
        if missing := [name for name in [*ends, *sum(roots, ())] if name not in places]:
            raise not_its_original(f"the teacher has no '{missing[0]}'")
        stops = [*(places[name] + 1 for name in ends), len(other)]
        segments = [
            Segment(start, stop, ours.name, ours.layers)
            for start, stop, ours in zip([0, *stops[:-1]], stops, self._segments, strict=True)
        ]
        for ours, theirs in zip(self._segments, segments, strict=True):
            layers = modules_run(own[ours.start : ours.end], self.traced)
            others = modules_run(other[theirs.start : theirs.end], traced)
            if layers != others:
                raise not_its_original(
                    f"block '{ours.name}' has {', '.join(layers)}, the teacher "
                    f"{', '.join(others) or 'nothing'} there",
                    ", one that runs the same in training",
                )
        return TracedCuts(traced, segments, roots)

    def run(self, x: Tensor, visit: Visit) -> Tensor:
        """See `Cuts.run`."""
        logits = x
        for index, (roots, output) in enumerate(self.walk(x)):
            visit(index, roots, output)
            if output is not None:
                logits = output.detach()
        return logits

    def walk(self, x: Tensor, detached: bool = True) -> Walk:
        """See `Cuts.walk`; graphs cross the cuts if not `detached`."""
        start = {self._parts[0].given[0]: x}
        return Walk(self._parts, start, detached=detached, few=self._few)

    def learning_from(self, few: Few) -> "TracedCuts":
        """The same, whose blocks before the last learn from a few images of a batch alone."""
        cuts = copy(self)
        cuts._few = few
        return cuts

    def counts(self, example: Tensor) -> frozenset[str]:
        """Names of what crosses cuts and is no tensor, but a count of the batch's images.

        Args:
            example: (N, C, H, W); one image of it is used.

        Raises:
            StiefelError: names what crosses a cut otherwise than image by image.
        """
        crossing = {name for part in self._parts[:-1] for name in part.passed}
        values = values_of(self.traced, example, IMAGES + 2)
        counts = set()
        for node in (n for n in self.traced.values if n.name in crossing):
            few, more = self.traced.values[node], values[node]
            if isinstance(few, int) and (few, more) == (IMAGES, IMAGES + 2):
                counts.add(node.name)
            elif not _alike(few, more):
                of = f" {tuple(few.shape)} for {IMAGES} images" if isinstance(few, Tensor) else ""
                raise StiefelError(
                    f"sample: '{node.name}' crosses a cut{of}, without the batch in front; leave "
                    "sample out"
                )
        return frozenset(counts)


def _alike(few: Any, more: Any) -> bool:
    """Whether values of `IMAGES` images, and of two more, differ in the rows of a tensor alone."""
    if isinstance(few, Tensor):
        rows = (IMAGES, *few.shape[1:]), (IMAGES + 2, *few.shape[1:])
        return few.ndim > 0 and (few.shape, more.shape) == rows
    return not any(isinstance(leaf, Tensor) for leaf in tree_leaves(few)) and few == more


def not_its_original(why: str, which: str = "") -> StiefelError:
    """What is said of a teacher that is not the dense original."""
    return StiefelError(
        f"{why}: give the dense original that the network was converted from{which}"
    )


def _split(
    traced: Traced, segments: list[Segment], roots: list[tuple[str, ...]] | None
) -> list[Part]:
    """Each segment as a graph of its own."""
    nodes = body(traced.graph)
    output = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    fixed = constant_nodes(nodes)
    live = live_nodes(traced.graph)
    image = traced.values[nodes[0]].shape
    parts = []
    for index, segment in enumerate(segments):
        mine = [n for n in nodes[segment.start : segment.end] if n not in fixed]
        last = segment.end == len(nodes)
        after = set() if last else set(live[segment.end - 1])
        passed = [n for n in mine if n in after]
        if roots is not None:
            rooted = [n for n in mine if n.name in roots[index]]
        elif segment.hidden is not None:
            rooted = [n for n in live[segment.hidden - 1] if n in set(mine)]
        else:
            rooted = passed
        # Only what depends on a parameter of this block is worth a local loss.
        trained = trained_nodes(mine, fixed, traced)
        rooted = [n for n in rooted if n in trained and can_be_root(traced.values[n])]
        made = list(dict.fromkeys([*passed, *rooted]))
        written = set().union(*(traced.writes[n] for n in mine))
        given, graph = _subgraph(mine, fixed, made, output if last else None)
        parts.append(
            Part(
                module=fx.GraphModule(traced.module, graph, class_name="Block"),
                given=tuple(n.name for n in given),
                made=(*(n.name for n in made), *(["output"] if last else [])),
                roots=tuple(make_root(n.name, traced.values[n].shape, image) for n in rooted),
                passed=tuple(n.name for n in passed),
                done=tuple(n.name for n in given if n not in after),
                overwritten=frozenset(n.name for n in given if n in written),
                last=last,
            )
        )
    return parts


def _subgraph(
    nodes: list[fx.Node], fixed: set[fx.Node], made: list[fx.Node], output: Any | None
) -> tuple[list[fx.Node], fx.Graph]:
    """The nodes as a function of what comes from before them, and the nodes that it takes."""
    inside = set(nodes)
    needed = [m for n in nodes for m in (n, *n.all_input_nodes)]
    if output is not None:
        fx.node.map_arg(output, needed.append)
    given = [
        n
        for n in dict.fromkeys(needed)
        if n.op == "placeholder" or (n not in inside and n not in fixed)
    ]
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in given}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            for before in node.all_input_nodes:
                copy(before)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    for node in nodes:
        copy(node)
    results = [copies[node] for node in made]
    if output is not None:
        results.append(fx.node.map_arg(output, copy))
    graph.output(tuple(results))
    return given, graph
