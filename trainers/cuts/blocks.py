"""Blocks, their roots (the tensors from which a block's local loss is made), and their settings."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from converter.settings import Settings

# visit(index of the block, its roots, the logits at the last block)
Visit = Callable[[int, tuple[Tensor, ...], Tensor | None], None]

Layout = Literal["flat", "tokens", "map", "map-last"]


class CutSettings(Settings):
    """Where the network is cut into blocks, shared by every local rule."""

    boundaries: Literal["balanced", "units", "layers"] = Field(
        "balanced",
        description="cut where exactly one tensor is live, as between residual units, and join "
        "units to the fewest blocks that memory allows (balanced); join none (units); or cut after "
        "every layer, residual streams being detached too (layers)",
    )
    memory: float = Field(
        0.55,  # the best measured: half and a little, for units seldom end at the half
        ge=0,
        le=1,
        description="share of backpropagation's activations that a balanced block may hold; the "
        "largest unit's need is allowed in any case",
    )
    layers_per_block: int = Field(
        1,
        ge=1,
        description="layers, factored or dense, to a block (at least; balanced may join more)",
    )
    sample: int = Field(
        1,
        ge=1,
        description="blocks before the last learn from one image of a batch in so many; the others "
        "only run through them, which takes less memory and time; with a layerwise error",
    )
    blocks: tuple[str, ...] = Field(
        (), description="submodules that are the blocks, as globs; for models that cannot be traced"
    )


@dataclass(frozen=True)
class Root:
    """A tensor that a block hands on.

    Attributes:
        name: the node that makes it.
        shape: without the batch.
        layout: flat (N, C), tokens (N, T, C), map (N, C, H, W) or map-last (N, H, W, C).
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout

    @property
    def is_map(self) -> bool:
        """Whether it is a feature map."""
        return self.layout in ("map", "map-last")

    @property
    def sides(self) -> tuple[int, int]:
        """(H, W) of a feature map."""
        return self.shape[1:] if self.layout == "map" else self.shape[:2]

    def cells(self, grid: int) -> tuple[int, int]:
        """Rows and columns that a feature map is averaged to: `grid`, or its own where fewer."""
        height, width = self.sides
        return min(grid, height), min(grid, width)

    def features(self, grid: int) -> int:
        """D, how many features `pooled` gives."""
        if self.is_map:
            return self.channels * math.prod(self.cells(grid))
        return self.shape[-1] if self.layout == "tokens" else math.prod(self.shape)

    def grid(self, side: int, most: int) -> int:
        """The largest of side, side // 2, … 1 that gives at most `most` features, or 1."""
        while side > 1 and self.features(side) > most:
            side //= 2
        return side

    @property
    def channels(self) -> int:
        """The axis on which a layer's outputs lie."""
        return self.shape[0] if self.layout == "map" else self.shape[-1]

    def pooled(self, h: Tensor, grid: int) -> Tensor:
        """Features for a read-out: maps averaged to at most grid x grid, tokens to their mean.

        Args:
            h: (N, *shape), a value of this root.
            grid: side of the grid.

        Returns:
            (N, D).
        """
        if self.layout == "tokens":
            return h.mean(dim=1)
        return (self.averaged(h, grid) if self.is_map else h).flatten(1)

    def averaged(self, h: Tensor, grid: int) -> Tensor:
        """A feature map h (N, *shape) averaged to (N, C, rows, columns), at most grid x grid."""
        if self.layout == "map-last":
            h = h.permute(0, 3, 1, 2)
        (height, width), (rows, columns) = self.sides, self.cells(grid)
        if height % rows == 0 and width % columns == 0:
            # The same means; unlike adaptive pooling, it repeats bit for bit on CUDA.
            return _CellMeans.apply(h, (height // rows, width // columns))
        return F.adaptive_avg_pool2d(h, (rows, columns))


class _CellMeans(torch.autograd.Function):
    """Average pooling without padding, whose backward needs no copy of the maps.

    torch's own holds them for their shape alone, and reorders them where they are channels-last.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, cell: tuple[int, int]) -> Tensor:
        ctx.cell, ctx.shape = cell, h.shape
        last = h.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if last else torch.contiguous_format
        return F.avg_pool2d(h, cell)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        height, width = ctx.cell
        shares = (gradient / (height * width)).contiguous(memory_format=ctx.layout)
        options = {"dtype": shares.dtype, "device": shares.device}
        spread = torch.empty(ctx.shape, memory_format=ctx.layout, **options)
        cells = spread.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        cells.copy_(shares[:, :, :, None, :, None])
        return spread, None


@dataclass(frozen=True)
class Block:
    """A local block: its name, its layers' names, its roots, and the module that holds them."""

    name: str
    layers: tuple[str, ...]
    roots: tuple[Root, ...]
    module: nn.Module

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train with this block."""
        return self.module.parameters()


def make_root(name: str, shape: tuple[int, ...], image: tuple[int, ...]) -> Root:
    """Tell a root's layout from its shape.

    Args:
        name: the node's.
        shape: (N, ...) of the root.
        image: (N, C, H, W) of the input; a map has its sides in the same proportion.
    """
    shape = tuple(shape[1:])
    if len(shape) == 1:
        layout: Layout = "flat"
    elif len(shape) == 2:
        layout = "tokens"
    elif len(shape) == 3 and _alike(shape[1:], image) >= _alike(shape[:2], image):
        layout = "map"
    elif len(shape) == 3:
        layout = "map-last"
    else:
        layout = "flat"
    return Root(name, shape, layout)


def logits_of(output: Any) -> Tensor:
    """The first tensor of a network's output, which is the logits where there are several."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _alike(sides: tuple[int, ...], image: tuple[int, ...]) -> bool:
    """Whether the sides could be the input's, divided by one stride."""
    height, width = image[-2:]
    return abs(sides[0] / height - sides[1] / width) < 1 / min(height, width)
