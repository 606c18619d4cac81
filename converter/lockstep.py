"""A network and its factored copy run side by side, node by node, on many images in bounded memory.

Both have one graph. What each node gives for all images is held until its last use; where that
would be more than `ACTIVATIONS`, the first nodes see fewer of the images, and the others join
later, where activations have become small enough: every image passes every node once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from converter.calibration import batch_size

ACTIVATIONS = 2**30  # bytes of both networks' activations that are held at once
_TRIAL = 2  # images of the run that finds out what a node holds


class Meeting(NamedTuple):
    """One module of both networks on some of the images.

    Attributes:
        start: the place of the first of these images among all.
        given: the input of the factored network's module.
        input: that of the dense one's.
        output: that of the dense one's.
        dense, small: values of graph nodes, by name, as far as they are still needed.
    """

    start: int
    given: Tensor
    input: Tensor
    output: Tensor
    dense: Mapping[str, Any]
    small: Mapping[str, Any]


class Station:
    """A module that both networks are about to run; all before it is final in the factored one.

    Attributes:
        name: the module's.
        images: how many have come so far.
    """

    def __init__(self, name: str, node: fx.Node, chunks: list[_Chunk]) -> None:
        self.name, self._node, self._chunks = name, node, chunks
        self.images = sum(chunk.images for chunk in chunks)

    def meetings(self) -> Iterator[Meeting]:
        """What the module is given, and gave, in turns of some images each."""
        for chunk in self._chunks:
            seen = chunk.dense.catch(self._node, self.name)
            given = chunk.small.catch(self._node, self.name, before=True)
            values = chunk.dense.values(), chunk.small.values()
            yield Meeting(chunk.start, given.inputs[0], seen.inputs[0], seen.output, *values)


def stations(
    dense: nn.Module, small: nn.Module, graph: fx.Graph | None, names: Iterable[str], images: Tensor
) -> Iterator[Station]:
    """The named modules in the order in which they run, those that run just once.

    Whoever takes a station may change the factored network's module there; the networks go on with
    the result when the next is asked for.

    Args:
        dense: in evaluation mode.
        small: of the same graph, likewise.
        graph: of both; without one the whole network is run anew for every module.
        names: of modules.
        images: (N, C, H, W) on the networks' device.
    """
    graph = _opaque() if graph is None else graph
    inside, held = _trial(dense, graph, set(names), images)
    last = _last_uses(graph)
    size = batch_size(images)
    chunks: list[_Chunk] = []
    done: list[fx.Node] = []
    for node in graph.nodes:
        wanted = min(len(images), max(1, ACTIVATIONS // max(held[node], 1)))
        start = sum(chunk.images for chunk in chunks)
        while start < wanted:
            x = images[start : start + min(size, wanted - start)]
            chunks.append(_Chunk(start, len(x), _Run(dense, graph, x), _Run(small, graph, x)))
            for before in done:
                chunks[-1].pass_through(before, last)
            start += len(x)
        for name in inside.get(node, ()):
            yield Station(name, node, chunks)
        for chunk in chunks:
            chunk.pass_through(node, last)
        done.append(node)


class _Arrived(Exception):  # noqa: N818 — no error
    """A run has come to the module that was waited for."""

    def __init__(self, inputs: tuple[Tensor, ...], output: Tensor | None) -> None:
        self.inputs, self.output = inputs, output


class _Run(fx.Interpreter):
    """One network on some images, node by node."""

    def __init__(self, model: nn.Module, graph: fx.Graph, x: Tensor) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.args_iter = iter([x])

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        """The whole network goes by the name ''."""
        return self.module.get_submodule(target)(*args, **kwargs)

    def step(self, node: fx.Node) -> None:
        """Run one node, unless that has been done."""
        if node not in self.env and node.op != "output":
            self.env[node] = self.run_node(node)

    def catch(self, node: fx.Node, name: str, *, before: bool = False) -> _Arrived:
        """What module `name` is given and gives inside a node; only the former if `before`."""

        def arrive(module: nn.Module, inputs: tuple, output: Tensor | None = None) -> None:
            raise _Arrived(inputs, output)

        module = self.module.get_submodule(name)
        hook = module.register_forward_pre_hook if before else module.register_forward_hook
        handle, env = hook(arrive), self.env
        if node.target != name:
            # What the node does in place before it comes there is to be done but once.
            inputs = {n: tree_map_only(Tensor, torch.clone, env[n]) for n in node.all_input_nodes}
            self.env = {**env, **inputs}
        try:
            self.run_node(node)
        except _Arrived as arrival:
            if node.target == name and not before:
                env[node] = arrival.output
            return arrival
        finally:
            handle.remove()
            self.env = env
        raise AssertionError(f"{name} did not run in {node.name}")

    def values(self) -> dict[str, Any]:
        """What is held, by nodes' names."""
        return {node.name: value for node, value in self.env.items()}


@dataclass
class _Chunk:
    """Some of the images, in both networks."""

    start: int
    images: int
    dense: _Run
    small: _Run

    def pass_through(self, node: fx.Node, last: Mapping[fx.Node, list[fx.Node]]) -> None:
        for run in (self.dense, self.small):
            run.step(node)
            for dead in last.get(node, ()):
                run.env.pop(dead, None)


def _trial(
    dense: nn.Module, graph: fx.Graph, names: set[str], images: Tensor
) -> tuple[dict[fx.Node, list[str]], dict[fx.Node, int]]:
    """Which named modules run, once each, inside each node; bytes an image needs from there on."""
    calls: list[str] = []
    handles = [
        dense.get_submodule(name).register_forward_pre_hook(lambda m, i, n=name: calls.append(n))
        for name in names
    ]
    run, last = _Run(dense, graph, images[:_TRIAL]), _last_uses(graph)
    inside: dict[fx.Node, list[str]] = {}
    held: dict[fx.Node, int] = {}
    try:
        for node in graph.nodes:
            before = len(calls)
            run.step(node)
            inside[node] = calls[before:]
            held[node] = 2 * _bytes(run.env.values()) // len(images[:_TRIAL])
            for dead in last.get(node, ()):
                run.env.pop(dead, None)
    finally:
        for handle in handles:
            handle.remove()
    most = 0
    for node in reversed(graph.nodes):
        held[node] = most = max(held[node], most)
    once = {node: [n for n in found if calls.count(n) == 1] for node, found in inside.items()}
    return once, held


def _bytes(values: Iterable[Any]) -> int:
    tensors = [leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """By node, those whose values nothing after it needs."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for needed in (*node.all_input_nodes, node):
            if needed not in seen:
                seen.add(needed)
                last.setdefault(node, []).append(needed)
    return last


def _opaque() -> fx.Graph:
    """A graph whose one node is the whole network."""
    graph = fx.Graph()
    graph.output(graph.create_node("call_module", "", (graph.placeholder("x"),), name="network"))
    return graph
