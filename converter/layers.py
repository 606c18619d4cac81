"""Which layers of a model can be factored, why the others cannot, and how to put one in place.

A *prepared* model is a copy in which every weight worth factoring belongs to a layer of its own:
parametrizations are folded, and nn.MultiheadAttention is opened into two linear projections.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from converter import schemes
from converter.attention import FactoredAttention
from converter.decompose import Factors
from converter.errors import StiefelError
from converter.factors import Factored, FactoredConv1d, FactoredConv2d, FactoredLinear

FIRST_CONVOLUTION_CHANNELS = 4  # images have 1 to 4; such a layer is cheap and shapes all the rest

_PLAIN: dict[type[nn.Module], type[Factored]] = {
    nn.Linear: FactoredLinear,
    nn.Conv1d: FactoredConv1d,
    nn.Conv2d: FactoredConv2d,
}
_UNSUPPORTED = (
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.MultiheadAttention,
)


@dataclass(frozen=True)
class Layer:
    """One weighty layer of a prepared model.

    Attributes:
        name: as in `model.named_modules()`.
        kind: the module's kind, such as "Conv2d", or "factored Conv2d".
        module: the layer itself.
        refusal: why it can't be factored, or None.
        advice: why it is better kept dense unless asked for by name, or None.
        tied_to: the name of an earlier layer that holds the same weight, or None.
    """

    name: str
    kind: str
    module: nn.Module
    refusal: str | None = None
    advice: str | None = None
    tied_to: str | None = None

    @property
    def is_factored(self) -> bool:
        """Whether the layer holds U, S, V already."""
        return isinstance(self.module, Factored)

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return next(self.module.parameters()).device

    @property
    def groups(self) -> int:
        """Groups of a convolution, else 1."""
        return getattr(self.module, "groups", 1)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight: (N, C) or (N, C/G, *K)."""
        if self.is_factored:
            return self.module.weight_shape
        weight = getattr(self.module, "weight", None)
        return tuple(weight.shape) if isinstance(weight, Tensor) else ()

    @property
    def current_rank(self) -> int | None:
        """The rank of a layer that is factored already."""
        return self.module.rank if self.is_factored else None

    @property
    def weight_parameters(self) -> int:
        """Parameters of the weight, or of U, S and V."""
        return self.parameters - self.bias_parameters

    @property
    def parameters(self) -> int:
        """Parameters of the layer as it is, bias included."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def bias_parameters(self) -> int:
        """Parameters of the bias."""
        bias = getattr(self.module, "bias", None)
        return bias.numel() if isinstance(bias, Tensor) else 0

    @property
    def schemes(self) -> tuple[schemes.Scheme | None, ...]:
        """The schemes that this layer may be factored by: (None,) for linear ones and refused."""
        if self.is_factored:
            return (getattr(self.module, "scheme", None),)
        if self.refusal is not None or isinstance(self.module, nn.Linear):
            return (None,)
        # With one tap along the last axis both read the same matrix.
        return schemes.SCHEMES if self.weight_shape[-1] > 1 else ("channel",)

    def shape(self, scheme: schemes.Scheme | None) -> tuple[int, int]:
        """(m, n) of one group's matrix."""
        return schemes.matrix_shape(self.weight_shape, scheme, self.groups)

    def highest_rank(self, scheme: schemes.Scheme | None) -> int:
        """The highest rank that can be asked for: full, or the present one if factored."""
        return self.current_rank or min(self.shape(scheme))

    def worthwhile_rank(self, scheme: schemes.Scheme | None) -> int:
        """The highest rank that holds fewer parameters than the layer does now; 0 if none."""
        per_rank = parameters_per_rank(self.shape(scheme), self.groups)
        return min((self.weight_parameters - 1) // per_rank, self.highest_rank(scheme))

    def matrix(self, scheme: schemes.Scheme | None) -> Tensor | Factors:
        """What is to be decomposed: (m, n), (G, m, n), or the factors of a factored layer."""
        if self.is_factored:
            return Factors(*(t.detach() for t in self.module.factors()))
        weight = self.module.weight.detach()
        return weight if scheme is None else schemes.to_matrix(weight, scheme, self.groups)

    def factored(self, factors: Factors, scheme: schemes.Scheme | None) -> Factored:
        """A factored layer with this layer's geometry, bias and training mode."""
        if self.is_factored:
            return self.module.with_factors(factors)
        if scheme is None:
            return FactoredLinear.from_dense(self.module, factors)
        kind = FactoredConv1d if isinstance(self.module, nn.Conv1d) else FactoredConv2d
        return kind.from_dense(self.module, factors, scheme)


def check_values(model: nn.Module, before: str) -> None:
    """Refuse a model that is not built or loaded yet.

    Args:
        before: what needs its values.

    Raises:
        StiefelError: names the first lazy or meta parameter.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
            raise StiefelError(f"{name} holds no values yet: run or load the model before {before}")


def prepared(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A deep copy with parametrizations folded and attention opened up; the model is untouched.

    Args:
        model: any module.
        share: keep the original's parameters and buffers instead of copying them: for looking, not
            for changing.

    Raises:
        StiefelError: a lazy or meta parameter holds no values yet, or a part is TorchScript.
    """
    refuse_scripted(model)
    memo: dict[int, object] = {id(t): t.detach() for t in _recomputed(model)}
    if share:
        memo |= {id(t): t for t in (*model.parameters(), *model.buffers())}
    check_values(model, "converting")
    ready = copy.deepcopy(model, memo)
    fold_parametrizations(ready)
    replace_modules(ready, _open_attention)
    return ready


def fold_parametrizations(model: nn.Module) -> None:
    """Make plain weights of parametrized ones (weight norm, orthogonal maps); in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _fold_parametrizations(module)


def refuse_scripted(model: nn.Module) -> None:
    """Refuse TorchScript, whose layers are compiled and can be neither read nor replaced.

    Raises:
        StiefelError: names the part that is.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            part = f"its part {name}" if name else "it"
            raise StiefelError(
                f"the model cannot be taken apart: {part} is TorchScript; give the module as it "
                "was before torch.jit"
            )


def closed(model: nn.Module) -> nn.Module:
    """Undo what `prepared` did to attention of which nothing was factored; in place."""

    def close(module: nn.Module) -> nn.Module:
        if isinstance(module, FactoredAttention) and not any(
            isinstance(child, Factored) for child in module.children()
        ):
            return module.dense()
        return module

    return replace_modules(model, close)


def find_layers(model: nn.Module) -> list[Layer]:
    """Every layer with a weight matrix of a prepared model, in registration order, each once."""
    first_owner: dict[int, str] = {}
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    inside = {
        id(attention.out_proj): _refusal(attention)
        for attention in model.modules()
        if isinstance(attention, nn.MultiheadAttention)
    }
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, (*_PLAIN, *_UNSUPPORTED, Factored)):
            continue
        refusal, tied_to = inside.get(id(module)) or _refusal(module), None
        key = _weight_key(module)
        if refusal is None and key in first_owner:
            tied_to = first_owner[key]
        elif refusal is None and (strangers := _strangers(module, owners[key])):
            refusal = f"its weight is shared with a {strangers[0]}, which cannot be factored alike"
        if refusal is None:
            first_owner.setdefault(key, name)
        layers.append(Layer(name, _kind(module), module, refusal, _advice(module), tied_to))
    return layers


def install(model: nn.Module, new: dict[str, nn.Module]) -> nn.Module:
    """Replace the named modules wherever they are registered; in place."""
    by_identity = {id(model.get_submodule(name)): module for name, module in new.items()}
    if id(model) in by_identity:
        return by_identity[id(model)]
    return replace_modules(model, lambda module: by_identity.get(id(module), module))


def replace_modules(model: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Apply `replacement(module) -> module` to every registered child; in place, root included."""
    done: dict[int, nn.Module] = {}

    def swap(module: nn.Module) -> nn.Module:
        if id(module) not in done:
            done[id(module)] = module  # a cycle would end here
            for name, child in list(module._modules.items()):
                if child is not None:
                    module._modules[name] = swap(child)
            done[id(module)] = replacement(module)
        return done[id(module)]

    return swap(model)


def _open_attention(module: nn.Module) -> nn.Module:
    if type(module) is nn.MultiheadAttention and _attention_refusal(module) is None:
        return FactoredAttention.from_dense(module)
    return module


def _attention_refusal(module: nn.MultiheadAttention) -> str | None:
    if not module._qkv_same_embed_dim:
        return "attention whose keys or values have a width of their own is not factored"
    if module.bias_k is not None or module.add_zero_attn:
        return "attention with add_bias_kv or add_zero_attn is not factored"
    return None


def _recomputed(model: nn.Module) -> list[Tensor]:
    """Plain attributes that hold results of autograd, which cannot be copied as they are.

    The old hooks of weight norm, spectral norm and pruning keep the weight so.
    """
    return [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]


@torch.no_grad()
def _fold_parametrizations(module: nn.Module) -> None:
    # torch's own removal writes into the original tensors and class, which a copy may share.
    chains = module.parametrizations.eval()  # spectral norm iterates in training mode
    values = {name: getattr(module, name).clone() for name in chains}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        sources = list(chains[name].parameters())
        if sources:
            trained = any(p.requires_grad for p in sources)
            module.register_parameter(name, nn.Parameter(value, requires_grad=trained))
        else:
            module.register_buffer(name, value)


def _refusal(module: nn.Module) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        return _attention_refusal(module) or f"its class {type(module).__name__} is not known"
    if isinstance(module, _UNSUPPORTED):
        return f"{type(module).__name__} layers are not factored"
    if isinstance(module, Factored):
        return None
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is recomputed at every step (weight or spectral norm, pruning)"
    if not _computes_plainly(module):
        return f"its class {type(module).__name__} changes what the layer computes"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which another layer in its place would not have"
    if getattr(module, "groups", 1) > 1 and module.weight.shape[1] == 1:
        return "depthwise: one input channel to a group leaves nothing to factor"
    return None


def _advice(module: nn.Module) -> str | None:
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1:
        channels = module.in_channels
        if channels <= FIRST_CONVOLUTION_CHANNELS:
            return f"first convolution: {channels} input channel{'s' * (channels > 1)}"
    return None


def _computes_plainly(module: nn.Module) -> bool:
    """Whether a subclass of a known layer still computes what that layer computes."""
    base = next(base for base in _PLAIN if isinstance(module, base))
    return all(
        getattr(type(module), method, None) is getattr(base, method, None)
        for method in ("forward", "_conv_forward", "__call__")
    )


def _kind(module: nn.Module) -> str:
    if isinstance(module, Factored):
        return type(module).__name__.replace("Factored", "factored ")
    return next(
        (k.__name__ for k in (*_PLAIN, *_UNSUPPORTED) if isinstance(module, k)),
        type(module).__name__,
    )


def _weight_key(module: nn.Module) -> int:
    weight = module.U if isinstance(module, Factored) else module._parameters.get("weight")
    return id(module) if weight is None else id(weight)


def _strangers(module: nn.Module, owners: list[nn.Module]) -> list[str]:
    """Kinds of other owners of the same weight that don't read it as this layer does."""
    return [
        _kind(other)
        for other in owners
        if _kind(other) != _kind(module)
        or _refusal(other) is not None
        or getattr(other, "groups", 1) != getattr(module, "groups", 1)
    ]


def parameters_per_rank(shape: tuple[int, int], groups: int = 1) -> int:
    """What one more direction costs: U, S and V each grow by a column."""
    return groups * (sum(shape) + 1)
