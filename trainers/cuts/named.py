"""Cuts for networks that cannot be traced: the user names the submodules that are the blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from converter.errors import StiefelError
from trainers.cuts.blocks import Block, Visit, logits_of, make_root
from trainers.cuts.places import told_apart
from trainers.looking import dropping, undisturbed


class NamedCuts:
    """Cut after each submodule whose name matches, but the last, which the output head joins.

    What runs between two named blocks belongs to the later one.

    Args:
        network: left as it was.
        globs: such as ("encoder.layers.*",); a star stands for one level of names.
        example: (N, C, H, W); one image of it is used.

    Raises:
        StiefelError: nothing matches, blocks are nested, or a tensor bypasses a block.
    """

    def __init__(self, network: nn.Module, globs: tuple[str, ...], example: Tensor) -> None:
        self._network = network
        self._named = _matching(network, globs)
        self._calls: list[str] = []
        self._overwritten: set[int] = set()
        self._overwrites_image = False
        self.blocks = self._probe(example)

    def run(self, x: Tensor, visit: Visit) -> Tensor:
        """See `Cuts.run`."""
        held: list[tuple[Tensor, ...]] = []
        last = len(self._calls) - 1

        def leave(index: int, output: Any) -> Any:
            roots = _roots(output)
            if index == last:
                held.append(roots)
                return output
            visit(index, roots, None)
            return self._handed_on(index, output)

        logits = self._forward(x, leave)
        visit(last, held.pop(), logits)
        return logits.detach()

    def walk(self, x: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        """See `Cuts.walk`; a network that cannot be traced runs whole, so all roots are kept."""
        kept: list[tuple[Tensor, ...]] = []

        def leave(index: int, output: Any) -> Any:
            kept.append(_roots(output))
            return self._handed_on(index, output)

        logits = self._forward(x, leave)
        for index, roots in enumerate(kept):
            yield roots, logits if index == len(kept) - 1 else None

    def _handed_on(self, index: int, output: Any) -> Any:
        """What the network goes on with: detached, and a copy where it will be written into."""
        copied = index in self._overwritten
        return tree_map_only(Tensor, lambda t: t.detach().clone() if copied else t.detach(), output)

    def _forward(self, x: Tensor, leave: Callable[[int, Any], Any]) -> Tensor:
        """The logits; what the i-th block yields is exchanged for `leave(i, …)`."""
        left = iter(range(len(self._calls)))

        def hook(name: str, output: Any) -> Any:
            index = next(left, None)
            if index is None or self._calls[index] != name:
                raise _not_the_same(name)
            return leave(index, output)

        with self._hooked(hook):
            logits = logits_of(self._network(x.clone() if self._overwrites_image else x))
        if (index := next(left, None)) is not None:
            raise _not_the_same(self._calls[index])
        return logits

    @contextmanager
    def _hooked(self, hook: Callable[[str, Any], Any]) -> Iterator[None]:
        """Meanwhile what a named module yields is exchanged for `hook(name, …)`."""
        handles = [
            module.register_forward_hook(lambda m, i, output, name=name: hook(name, output))
            for name, module in self._named.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _probe(self, example: Tensor) -> tuple[Block, ...]:
        """Run once: the order of the blocks, their roots, and that nothing bypasses them."""
        images = example[:1].expand(3, *example.shape[1:]).contiguous()
        made: list[tuple[Tensor, ...]] = []
        handed: list[list[tuple[Tensor, int]]] = []  # what left each block, and its version then
        seen: set[Any] = set()

        def hook(name: str, output: Any) -> Any:
            values = _roots(output)
            if not values or any(value.shape[0] != len(images) for value in values):
                shapes = ", ".join(str(tuple(value.shape)) for value in values) or "nothing"
                raise StiefelError(
                    f"block '{name}' returns {shapes} of {len(images)} images, not float tensors "
                    "with the batch in front: name a module around it that does"
                )
            self._calls.append(name)
            made.append(values)
            graph = _graph(values)
            if graph & seen:
                raise StiefelError(
                    f"a tensor reaches block '{name}' past an earlier block: name blocks that "
                    "everything flows through"
                )
            seen.update(graph)
            handed.append([(value, value._version) for value in values])
            return tree_map_only(Tensor, Tensor.detach, output)

        version = images._version
        network = self._network
        # Dropout may write in place.
        with undisturbed(network), dropping(network), torch.enable_grad(), self._hooked(hook):
            output = logits_of(network(images))
        self._overwrites_image = images._version != version
        self._overwritten = {
            index
            for index, values in enumerate(handed)
            if any(value._version != version for value, version in values)
        }
        if _graph((output,)) & seen:
            raise StiefelError(
                "a tensor reaches the output past a named block: name blocks that everything "
                "flows through"
            )
        ends = [*made[:-1], (*made[-1], output)]
        return tuple(
            Block(
                name,
                (call,),
                tuple(
                    make_root(f"{name}:{i}", value.shape, images.shape)
                    for i, value in enumerate(values)
                ),
                self._trained(self._named[call], end),
            )
            for name, call, values, end in zip(
                told_apart(self._calls), self._calls, made, ends, strict=True
            )
        )

    def _trained(self, named: nn.Module, values: tuple[Tensor, ...]) -> nn.Module:
        """The modules behind these values of a block: the named one's, and what runs beside it."""
        leaves = {id(getattr(node, "variable", None)) for node in _graph(values, leaves=True)}
        own = {id(module) for module in named.modules()}
        return nn.ModuleList(
            module
            for module in self._network.modules()
            if id(module) in own
            or any(id(parameter) in leaves for parameter in module.parameters(recurse=False))
        )


def _not_the_same(name: str) -> StiefelError:
    return StiefelError(
        f"block '{name}' runs in one forward and not in another: name blocks that all run, in the "
        "same order, every time"
    )


def _roots(output: Any) -> tuple[Tensor, ...]:
    return tuple(
        leaf
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim >= 2
    )


def _graph(roots: tuple[Tensor, ...], leaves: bool = False) -> set[Any]:
    """Every function node behind the roots; without leaves, which shared layers may share."""
    found: set[Any] = set()
    stack = [root.grad_fn for root in roots if root.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in found or (type(node).__name__ == "AccumulateGrad" and not leaves):
            continue
        found.add(node)
        stack += [upstream for upstream, _ in node.next_functions if upstream is not None]
    return found


def _matching(network: nn.Module, globs: tuple[str, ...]) -> dict[str, nn.Module]:
    modules = {name: module for name, module in network.named_modules() if name}
    named: dict[str, nn.Module] = {}
    for glob in globs:
        dots = glob.count(".")
        found = {n for n in modules if n.count(".") == dots and fnmatchcase(n, glob)}
        if not found:
            raise StiefelError(
                f"no submodule of {type(network).__name__} matches {glob}; it has "
                f"{', '.join([*modules][:6])}, …"
            )
        named |= {name: modules[name] for name in modules if name in found}
    for name in named:
        if inner := next((n for n in named if n.startswith(f"{name}.")), None):
            raise StiefelError(f"blocks must not contain one another: '{name}' contains '{inner}'")
    return named
