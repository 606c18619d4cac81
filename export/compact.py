"""The compact form for inference: plain torch layers, the factored arithmetic kept.

S goes into the factors (√S on either side), batch norm into the layer it follows, and what only
training needed goes away. W is multiplied out only where two small products save nothing any more.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fusion

from converter.attention import FactoredAttention
from converter.factors import Factored, FactoredLinear, factored_layers
from converter.folding import Calls, folds, trace
from converter.layers import prepared


@dataclass(frozen=True)
class Compaction:
    """A compact model and what was done to get it; every entry is a layer's name."""

    model: nn.Module
    ranks: dict[str, int]  # layers that stay two small products
    merged: tuple[str, ...]  # whose rank saved neither parameters nor arithmetic: dense again
    folded: tuple[str, ...]  # batch norms that went into the layer before
    removed: tuple[str, ...]  # parts with parameters that inference never calls
    replaced: tuple[str, ...]  # every module that is another one now, parents before children


class PairedLinear(nn.Sequential):
    """Two linear layers for models that read `.weight` instead of calling the layer (Swin).

    `F.linear(x, layer.weight, layer.bias)` runs the two small products. The tensors have the names
    of a plain `nn.Sequential` of two `nn.Linear`.
    """

    @property
    def weight(self) -> "_PairedWeight":
        """Stands in for W (m, n)."""
        return _PairedWeight(self[0].weight, self[1].weight)

    @property
    def bias(self) -> Tensor | None:
        """(m,) or None."""
        return self[1].bias


class _PairedWeight:
    def __init__(self, first: Tensor, second: Tensor):
        self.first, self.second = first, second

    def __getitem__(self, rows: slice) -> "_PairedWeight":
        return _PairedWeight(self.first, self.second[rows])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None):
        bound = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        if function is not F.linear or not isinstance(bound.get("weight"), cls):
            return NotImplemented
        weight = bound["weight"]
        return F.linear(F.linear(bound["input"], weight.first), weight.second, bound.get("bias"))


def compact(model: nn.Module) -> nn.Module:
    """A deep copy of `model` for inference: eval mode, no gradients, no factored layers.

    Each factored layer becomes an `nn.Sequential` of two plain layers. The outputs change by
    rounding only. See :func:`compaction` for what was done to which layer.
    """
    return compaction(model).model


@torch.no_grad()
def compaction(model: nn.Module) -> Compaction:
    """Like :func:`compact`, with the account of what was merged, folded and removed.

    Batch norm is folded where a trace with `torch.fx` shows that it alone follows a convolution
    or linear layer; in a model that can't be traced it stays.
    """
    model = prepared(model).eval()
    calls = trace(model)
    follows = folds(model, calls)
    new: dict[str, nn.Module] = {}
    ranks, merged, pairs = {}, [], {}
    factored = factored_layers(model)
    for name, layer in factored.items():
        read = calls is not None and name in calls.read
        # Where a model reads a weight, only a linear layer's can stay two products.
        if _pays(layer) and (not read or isinstance(layer, FactoredLinear)):
            ranks[name] = layer.rank
            called = calls is not None and name in calls.called and not read
            new[name] = _pair(layer, _norm(model, follows, name), called, pairs)
        else:
            merged.append(name)
            new[name] = _single(_dense(layer), _norm(model, follows, name))
    for name in follows:
        if name not in factored:
            new[name] = _single(model.get_submodule(name), _norm(model, follows, name))
    for name in follows.values():
        new[name] = nn.Identity()
    removed = _uncalled(model, calls)
    new |= {name: nn.Identity() for name in removed}
    opened = [n for n, m in model.named_modules() if isinstance(m, FactoredAttention)]
    replaced = (*opened, *_replace(model, new))
    return Compaction(
        model.eval().requires_grad_(False),
        ranks=ranks,
        merged=tuple(merged),
        folded=tuple(follows.values()),
        removed=removed,
        replaced=replaced,
    )


def reads_size(model: nn.Module) -> bool:
    """Whether the forward pass looks at an image's height or width, as far as a trace tells."""
    calls = trace(model)
    if calls is None:
        return True
    for node in calls.graph.nodes:
        shape = node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
        if shape and any(user.args[1:] != (0,) for user in node.users):
            return True
        if node.op == "call_method" and node.target == "size" and node.args[1:] != (0,):
            return True
        # A function that torch.fx was told to keep whole may do so unseen.
        module = str(getattr(node.target, "__module__", "torch"))
        if node.op == "call_function" and module.startswith(("torchvision", "timm", "converter")):
            return True
    return False


def _norm(model: nn.Module, follows: dict[str, str], name: str) -> nn.Module | None:
    return model.get_submodule(follows[name]) if name in follows else None


def _pays(layer: Factored) -> bool:
    """Whether two small layers save parameters or arithmetic against the one large layer."""
    first, second = layer.pair()
    small, large = (first.weight.numel(), second.weight.numel()), _dense(layer).weight.numel()
    # The first convolution's output is not yet strided along the second one's axes.
    positions = math.prod(getattr(second, "stride", (1,)))
    return sum(small) < large or small[0] * positions + small[1] < large


def _dense(layer: Factored) -> nn.Module:
    """The layer multiplied out in float64, then rounded once."""
    return copy.deepcopy(layer).double().dense().to(layer.U.dtype)


def _pair(layer: Factored, norm: nn.Module | None, called: bool, pairs: dict) -> nn.Sequential:
    """Two plain layers; layers that share their factors share their tensors."""
    kind = nn.Sequential if called or not isinstance(layer, FactoredLinear) else PairedLinear
    key = tuple(id(tensor) for tensor in (layer.U, layer.S, layer.V))
    first, second = (half.to(layer.U.dtype) for half in _fold(layer, norm))
    if norm is None and key in pairs:
        first.weight, second.weight = pairs[key]
    elif norm is None:
        pairs[key] = first.weight, second.weight
    return kind(first, second).eval()


def _fold(layer: Factored, norm: nn.Module | None) -> tuple[nn.Module, nn.Module]:
    first, second = copy.deepcopy(layer).double().pair()
    return first, _single(second, norm)


def _single(layer: nn.Module, norm: nn.Module | None) -> nn.Module:
    """A convolution or linear layer with the batch norm after it folded in, in float64."""
    if norm is None:
        return layer
    dtype, layer, norm = layer.weight.dtype, copy.deepcopy(layer).double(), norm.double()
    # Without affine parameters the linear form of the helper has no defaults.
    scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    fuse = (
        fusion.fuse_linear_bn_weights
        if isinstance(layer, nn.Linear)
        else fusion.fuse_conv_bn_weights
    )
    statistics = (norm.running_mean, norm.running_var, norm.eps)
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics, scale, shift)
    return layer.to(dtype)


def _uncalled(model: nn.Module, calls: Calls | None) -> tuple[str, ...]:
    """Outermost modules with parameters that the traced forward pass never touches."""
    if calls is None:
        return ()
    used = set(calls.called)
    used |= {node.target for node in calls.graph.nodes if node.op == "get_attr"}
    modules = dict(model.named_modules())
    unused: list[str] = []
    for name, module in modules.items():
        inside = name + "."
        if not name or any(name.startswith(outer + ".") for outer in unused):
            continue
        if any(u == name or u.startswith(inside) or name.startswith(u + ".") for u in used):
            continue
        if any(True for _ in module.parameters()):
            unused.append(name)
    return tuple(unused)


def _replace(model: nn.Module, new: dict[str, nn.Module]) -> tuple[str, ...]:
    """Put the new modules in place under each name the old ones had."""
    by_id = {id(model.get_submodule(name)): module for name, module in new.items()}
    aliases = [
        (name, by_id[id(module)])
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in by_id
    ]
    for name, module in aliases:
        model.set_submodule(name, module)
    return tuple(name for name, _ in aliases)
