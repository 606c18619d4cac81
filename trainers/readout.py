"""What a read-out and feedback see of a block's roots: averaged maps, or learned features of them.

A linear read-out asks a block for classes at once, and an early block that obeys throws away what
later ones need. With layers of its own the read-out asks for features that classes can be made of:
auxiliary networks, Belilovsky et al. 2019 (arXiv 1812.11446). Nøkland & Eidnes 2019 (arXiv
1901.06656, section 2.1) put one convolution before similarity matching. The map itself stays beside
them, as in DenseNets (arXiv 1608.06993): they are narrow, and what they cannot carry would be lost.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from trainers.cuts import Root

FINE = 2  # hidden layers that see twice the grid


class Features(nn.Module):
    """Features (N, D) of a root.

    Args:
        root: the tensor that a block hands on.
        grid: side of the grid to which maps are averaged.
        hidden: layers that maps go through first; None: none.

    Attributes:
        last: what is averaged, the root or what hidden layers make of it.
    """

    def __init__(self, root: Root, grid: int, hidden: "HiddenLayers | None" = None) -> None:
        super().__init__()
        self.root, self.grid, self.hidden = root, grid, hidden
        self.last = root if hidden is None else hidden.output

    @property
    def count(self) -> int:
        """D."""
        return self.last.features(self.grid)

    def forward(self, h: Tensor) -> Tensor:
        """h (N, *root.shape) to (N, D)."""
        return self.last.pooled(h if self.hidden is None else self.hidden(h), self.grid)

    def channels(self, B_U: Tensor, count: int) -> Tensor:
        """Orthonormal (C, count): the root's channels to which feedback of basis B_U (D, k) goes.

        The mean of B_U over a map's cells; or what the first hidden layer listens to most, where
        there is one (not what goes past it).
        """
        count = min(count, self.root.channels, B_U.shape[-1])
        if self.hidden is not None:
            return self.hidden.directions(count)
        cells = B_U.reshape(self.root.channels, -1, B_U.shape[-1])
        return torch.linalg.qr(cells.mean(dim=1)[:, :count]).Q


class HiddenLayers(nn.Module):
    """A map averaged to a grid, and beside it what 3x3 convolutions with norm and ReLU make of it.

    Two of them see twice the grid, the others the grid itself, where a layer costs a quarter. What
    a deep network's early blocks should give is features that many layers can work on: read-outs
    are deep in their place (AugLocal, Ma et al. 2024, arXiv 2402.17318).

    Without norms they do harm: ResNet-20, cut in three, lost four points by it. The norms go by the
    batch in hand, always: read-outs serve training, and need no statistics for later.

    Args:
        root: a feature map.
        grid: side of the grid that the read-out sees.
        layers: how many convolutions.
        width: channels of each.
        generator: draws the kernels (He et al. 2015), on the CPU.
    """

    def __init__(
        self, root: Root, grid: int, layers: int, width: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        name, channels = f"{root.name}, hidden", root.channels + width
        self.root, self.grid = root, grid
        self.fine = Root(name, (channels, *root.cells(2 * grid)), "map")
        coarse = Root(name, (channels, *root.cells(grid)), "map")
        self.output = coarse if layers > FINE else self.fine
        inputs = [root.channels] + [width] * (layers - 1)
        # Not drawn twice, the first time from the caller's random numbers.
        make = partial(skip_init, nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.layers = nn.ModuleList(make(n, width) for n in inputs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, track_running_stats=False) for _ in inputs)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        self.to(memory_format=torch.channels_last)

    def forward(self, h: Tensor) -> Tensor:
        """h (N, *root.shape) to (N, C + width, rows, columns)."""
        averaged = self.root.averaged(h, 2 * self.grid)
        # A fifth to a quarter quicker so, on a CPU; the network may be laid out either way.
        h = averaged = averaged.contiguous(memory_format=torch.channels_last)
        for place, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            if place == FINE:
                h, averaged = (self.fine.averaged(part, self.grid) for part in (h, averaged))
            h = F.relu(norm(layer(h)))
        return torch.cat([averaged, h], dim=1)

    def directions(self, count: int) -> Tensor:
        """The leading left singular vectors (C, count) of the first layer's kernel."""
        kernel = self.layers[0].weight.detach().transpose(0, 1).flatten(1)
        return torch.linalg.svd(kernel, full_matrices=False).U[:, :count]
