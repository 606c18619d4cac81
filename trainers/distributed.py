"""Several processes on one batch: each takes its share of the images, gradients are averaged.

`torchrun --nproc-per-node N -m stiefel train-local …` starts N processes; each finds its place in
the environment. The losses are of the whole batch: what they take from all its images together, as
similarity matching does, is exchanged. So N processes compute what one would but for batch norm,
whose statistics are of each process's own share unless it is synchronised, for dropout, and for
calibrated feedback, which is fitted on the first process's share.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from converter.errors import StiefelError, first_line
from trainers.device import wide


@dataclass(frozen=True)
class World:
    """This process's place among all: `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Self:
        """Where this process stands now."""
        joined = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if joined else cls()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def rows(self, mine: Tensor) -> Tensor:
        """(N, ...) of each process, one below the other; gradients come back from all of them."""
        return mine if self.size == 1 else _Gather.apply(wide(mine), self).flatten(0, 1)

    def variance(self, mine: Tensor) -> Tensor:
        """0-d, of all values that the processes hold, equally many each."""
        mine = wide(mine)
        if self.size == 1:
            return mine.var()
        variance, _ = self.moments(*torch.var_mean(mine, correction=0))
        count = mine.numel() * self.size
        return variance * (count / (count - 1))

    def moments(self, variance: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all processes' values together, from the (biased) ones of each."""
        variances, means = _Gather.apply(torch.stack((variance, mean)), self).unbind(1)
        mean = means.mean(0)
        # The parallel form of the variance: sums of squares would cancel.
        return (variances + (means - mean).square()).mean(0), mean

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @torch.no_grad()
    def broadcast_(self, *modules: nn.Module) -> None:
        """Give every process rank 0's parameters and buffers."""
        if self.size > 1:
            for module in modules:
                for tensor in (*module.parameters(), *module.buffers()):
                    dist.broadcast(tensor.detach(), 0)

    @torch.no_grad()
    def average_buffers_(self, module: nn.Module) -> None:
        """Average the floating-point buffers, such as each process's running batch statistics."""
        if self.size > 1:
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.size


def is_main_process() -> bool:
    """Whether this process is the one of torchrun's that writes, before training and after too."""
    return int(os.environ.get("RANK", 0)) == 0


def process_count() -> int:
    """How many processes torchrun started, before training too; one where it started none."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """The processes that torchrun started, or this one alone.

    Raises:
        StiefelError: torchrun's environment is there but the processes can't find each other, or
            one of them has ended while this one still needs it.
    """
    if dist.is_initialized():
        yield World.here()
        return
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise StiefelError(f"the processes can't find each other: {reason}") from error
    try:
        yield World.here()
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "onnection" in str(error):
            raise StiefelError("another process has ended: it says why") from error
        raise
    finally:
        dist.destroy_process_group()


class GradientAverage:
    """Sums gradients over the processes as they arise, while the backward pass goes on.

    Each parameter's gradient is sent off by a hook when it is complete; `finish` waits for all. A
    parameter that several blocks share completes only after as many accumulations as the first step
    counted, so the first step sends nothing before `finish`. The rule scales its losses, so that
    the sum is the mean.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World) -> None:
        self._parameters = list(parameters) if world.size > 1 else []
        self._pending: list[dist.Work] = []
        self._sent: set[int] = set()
        self._arrived: Counter[int] = Counter()
        self._expected: Counter[int] | None = None
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._arrive)
            for p in self._parameters
            if p.requires_grad
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def finish(self) -> None:
        """Wait until every gradient is the sum over all processes."""
        if not self._parameters:
            return
        for parameter in self._parameters:
            if id(parameter) not in self._sent and parameter.grad is not None:
                self._send(parameter)
        for work in self._pending:
            work.wait()
        if self._expected is None:
            self._expected = self._arrived
        elif self._arrived != self._expected:
            raise StiefelError(
                "the network's graph changed between steps, which training in several processes "
                "does not support"
            )
        self._pending, self._sent, self._arrived = [], set(), Counter()

    def _arrive(self, parameter: nn.Parameter) -> None:
        self._arrived[id(parameter)] += 1
        expected = self._expected
        if expected is not None and self._arrived[id(parameter)] == expected[id(parameter)]:
            self._send(parameter)

    def _send(self, parameter: nn.Parameter) -> None:
        self._sent.add(id(parameter))
        self._pending.append(dist.all_reduce(parameter.grad, async_op=True))


@contextmanager
def synchronised_batch_norm(world: World, *modules: nn.Module) -> Iterator[None]:
    """Meanwhile, batch norms in training mode use the statistics of all processes together.

    The modules stay what they are; only their forward is replaced. Works on any backend. One
    process alone has nothing to synchronise.

    Raises:
        StiefelError: a batch norm has a forward of its own that this could not stand in for.
    """
    shared = modules if world.size > 1 else ()
    named = [pair for module in shared for pair in module.named_modules()]
    norms = [(name, m) for name, m in named if isinstance(m, _BatchNorm)]
    for name, norm in norms:
        if type(norm).forward is not _BatchNorm.forward:
            kind = type(norm).__name__
            raise StiefelError(
                f"batch_norm sync does not know {name}'s {kind}; use train or frozen"
            )
    for _, norm in norms:
        norm.forward = partial(_synchronised_forward, norm, world)
    try:
        yield
    finally:
        for _, norm in norms:
            del norm.forward


def _synchronised_forward(norm: _BatchNorm, world: World, x: Tensor) -> Tensor:
    """Batch norm of x (N, C, ...) over the batches of all processes, equal in size."""
    if not norm.training:
        return _BatchNorm.forward(norm, x)
    axes = [0, *range(2, x.ndim)]
    values = wide(x)
    variance, mean = world.moments(*torch.var_mean(values, axes, correction=0))
    if norm.track_running_stats:
        _update_running(
            norm, mean.detach(), variance.detach(), x.numel() // x.shape[1] * world.size
        )
    scale = (variance + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return torch.addcmul(shift.view(shape), values, scale.view(shape)).to(x.dtype)


@torch.no_grad()
def _update_running(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    norm.num_batches_tracked += 1
    weight = norm.momentum
    if weight is None:  # a cumulative mean
        weight = 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
    unbiased = variance * (count / max(1, count - 1))
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), weight)


class _Gather(torch.autograd.Function):
    """Every process's tensor, stacked (size, ...); the gradient comes back from every process."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, world: World) -> Tensor:
        ctx.world = world
        parts = [torch.empty_like(mine) for _ in range(world.size)]
        dist.all_gather(parts, mine.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.world.sum_(gradient.contiguous())[ctx.world.rank], None
