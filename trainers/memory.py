"""What a training step holds in memory: the tensors that autograd saves for the backward pass.

Counted in bytes of live storages, so that the figure means the same on every device; a CUDA peak,
where there is a GPU, adds the allocator's own ways.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trainers.rules import RuleSettings, make_rule

MIB = 2**20


class SavedActivations:
    """Counts, while it is entered, the bytes that autograd holds for backward.

    The modules' parameters and buffers are not counted, and a storage that several nodes save
    counts once.

    Attributes:
        peak_bytes: the most that was held at any time.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.peak_bytes = 0
        self._live = 0
        self._holders: Counter[tuple[int, int]] = Counter()
        tensors = (t for m in modules for t in (*m.parameters(), *m.buffers()))
        self._own = {t.untyped_storage().data_ptr() for t in tensors}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> "SavedActivations":
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> "_Held":
        held = _Held(tensor)
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key[0] not in self._own:
            if not self._holders[key]:
                self._live += key[1]
                self.peak_bytes = max(self.peak_bytes, self._live)
            self._holders[key] += 1
            weakref.finalize(held, self._release, key)
        return held

    @staticmethod
    def _unpack(held: "_Held") -> Tensor:
        return held.tensor

    def _release(self, key: tuple[int, int]) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self._live -= key[1]


class _Held:
    """Stands for a saved tensor; it dies when autograd lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def activation_memory_mib(
    model: nn.Module,
    rule: RuleSettings,
    batch: Tensor,
    *,
    num_classes: int,
    teacher: nn.Module | None = None,
) -> float:
    """Peak MiB of activations that one training step of `rule` holds, on a copy of the model.

    Args:
        model: dense or factored; it is left as it is.
        batch: (N, C, H, W) images, on the model's device.
        num_classes: width of the model's output.
        teacher: the dense original, where the rule distils from one.
    """
    network = copy.deepcopy(model).train()
    learner = make_rule(rule)
    state = learner.init(network, batch, num_classes, torch.Generator().manual_seed(0), teacher)
    labels = torch.arange(len(batch), device=batch.device) % num_classes
    taught = [] if teacher is None else [teacher]
    with SavedActivations(network, state, *taught) as saved:
        learner.step(network, state, batch, labels)
    return saved.peak_bytes / MIB


def allocator_peak(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocator held during `work` beyond what it held before.

    Unlike `SavedActivations` this has everything: outputs, temporaries, gradients that arise.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(changes, initial=0))
