"""What a model costs: parameters, multiply-accumulates, and the shapes that each layer sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from converter import schemes
from converter.factors import Factored, FactoredLinear
from converter.stand_in import FactoredWeight

_WEIGHTED = (F.linear, F.conv1d, F.conv2d, torch.conv1d, torch.conv2d)


@dataclass(frozen=True)
class Call:
    """One use of a layer's weight: shapes with the batch axis, of one image."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, a shared one once."""
    return sum(p.numel() for p in model.parameters())


def dtype_of(model: nn.Module) -> torch.dtype:
    """The precision that a model takes images in: its first parameter's; float32 without any."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(dtypes, torch.float32)


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one image, by torch's flop counter (two flops each).

    Args:
        model: any model; its modes are left as found.
        example: a batch (N, C, H, W); its first image is run.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        # torch's counter looks for the graph of what requires gradients, and views have none here.
        for parameter in trained:
            parameter.requires_grad_(False)
        with inference(model), FlopCounterMode(display=False) as counter:
            model(example[:1])
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter.get_total_flops() // 2


def layer_calls(model: nn.Module, example: Tensor, images: int = 1) -> dict[str, list[Call]]:
    """Every use of each linear, convolutional or factored layer's weight in one forward pass.

    Functional uses (`F.linear(x, layer.weight)`) count; layers never used are absent. Shapes are
    those of the first `images` images of `example` (N, C, H, W).
    """
    names: dict[int, tuple[str, int | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            names.setdefault(id(module.U), (name, module.in_features))
        elif isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            names.setdefault(id(weight), (name, None))
    calls: dict[str, list[Call]] = {}
    hooks = [
        module.register_forward_hook(_record(calls, name))
        for name, module in model.named_modules()
        if isinstance(module, Factored) and not isinstance(module, FactoredLinear)
    ]
    try:
        with inference(model), _Recorder(names, calls):
            model(example[:images])
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def dense_macs(weight_shape: Sequence[int], calls: Sequence[Call]) -> int:
    """Multiply-accumulates of a dense layer with weight (N, C/G, *K)."""
    return sum(_size(weight_shape) * _positions(weight_shape, call) for call in calls)


def macs_per_rank(
    weight_shape: Sequence[int],
    scheme: schemes.Scheme | None,
    groups: int,
    calls: Sequence[Call],
) -> int:
    """Multiply-accumulates that one more direction adds to a factored layer."""
    outputs, inputs, *kernel = weight_shape
    if scheme is None:
        return sum((outputs + inputs) * _positions(weight_shape, call) for call in calls)
    first, second = schemes.split_kernel(kernel, scheme)
    total = 0
    for call in calls:
        sizes_in = call.input_shape[-len(kernel) :]
        sizes_out = call.output_shape[-len(kernel) :]
        # Between the two convolutions an axis has its output size unless the second covers it.
        between = [a if k > 1 else b for a, b, k in zip(sizes_in, sizes_out, second, strict=True)]
        total += groups * inputs * _size(first) * _size(between)
        total += outputs * _size(second) * _size(sizes_out)
    return total


@contextmanager
def inference(model: nn.Module, *, fused: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is put back afterwards.

    Attention's fused kernel hides its products from hooks and counters: it is off unless `fused`.
    """
    training = [module for module in model.modules() if module.training]
    was_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused and was_fused)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fused)
        for module in training:
            module.training = True


class _Recorder(TorchFunctionMode):
    """Notes every linear or convolution whose weight, or a slice of it, belongs to a layer."""

    def __init__(self, names: dict[int, tuple[str, int | None]], calls: dict[str, list[Call]]):
        super().__init__()
        self.names, self.calls = names, calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in _WEIGHTED:
            x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
            # A stand-in runs its two products unseen from here.
            weight = weight.U if isinstance(weight, FactoredWeight) else weight
            if id(weight) not in self.names:
                weight = weight._base
            if id(weight) in self.names:
                name, width = self.names[id(weight)]
                # U is met by the second product, whose input is not the layer's.
                input_shape = (*x.shape[:-1], width or x.shape[-1])
                self.calls.setdefault(name, []).append(Call(input_shape, tuple(output.shape)))
        return output


def _argument(args: tuple, kwargs: dict | None, place: int, name: str) -> Tensor:
    return args[place] if len(args) > place else kwargs[name]


def _record(calls: dict[str, list[Call]], name: str):
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.setdefault(name, []).append(Call(tuple(inputs[0].shape), tuple(output.shape)))

    return hook


def _positions(weight_shape: Sequence[int], call: Call) -> int:
    """How often the weight is applied; a slice of a packed weight counts for its share."""
    kernel = len(weight_shape) - 2
    if kernel:
        return _size(call.output_shape[-kernel:])
    return _size(call.output_shape) // weight_shape[0]


def _size(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
