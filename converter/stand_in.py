"""What stands in for the weight of a factored layer where a model reads it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from converter.decompose import Factors


def factored_linear(x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
    """(..., n) → (..., m): U diag(S) Vᵀ x + bias as two small products."""
    return F.linear(F.linear(x, V.mT) * S, U, bias)


class FactoredWeight:
    """What `layer.weight` is on a factored layer: stands in for W without forming it.

    `F.linear(x, weight, bias)` runs the two small products, so models that read `.weight` of a
    linear layer (Swin's attention) keep working; rows may be sliced. Any other torch function
    receives W itself, multiplied out and differentiable.
    """

    def __init__(self, U: Tensor, S: Tensor, V: Tensor, like: nn.Module | None = None):
        self.U, self.S, self.V, self._like = U, S, V, like

    def dense(self) -> Tensor:
        """W itself, in the shape of the dense layer's weight."""
        matrix = Factors(self.U, self.S, self.V).matrix()
        return matrix if self._like is None else self._like.unflatten_matrix(matrix)

    def __getitem__(self, rows: slice) -> FactoredWeight | Tensor:
        if isinstance(rows, slice) and self._like is None:
            return FactoredWeight(self.U[rows], self.S, self.V)
        return self.dense()[rows]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("U", "S", "V", "_like"):
            raise AttributeError(name)
        if name in ("device", "dtype", "is_cuda", "requires_grad"):
            return getattr(self.U, name)
        return getattr(self.dense(), name)

    def __fx_create_arg__(self, tracer: Any) -> Any:
        # Lets functions that torch.fx wraps (Swin's attention) take the weight as an argument.
        arguments = tuple(tracer.create_arg(a) for a in (self.U, self.S, self.V, self._like))
        return tracer.create_node("call_function", FactoredWeight, arguments, {})

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if function is F.linear and isinstance(weight, FactoredWeight) and weight._like is None:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return factored_linear(args[0] if args else kwargs["input"], *weight._factors(), bias)
        return function(*_multiplied_out(args), **_multiplied_out(kwargs))

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.U, self.S, self.V


def _multiplied_out(value: Any) -> Any:
    """The value with every stand-in, however deep in lists and tuples, replaced by its W."""
    if isinstance(value, FactoredWeight):
        return value.dense()
    if isinstance(value, dict):
        return {key: _multiplied_out(item) for key, item in value.items()}
    return type(value)(map(_multiplied_out, value)) if type(value) in (list, tuple) else value


def _operator(name: str) -> Any:
    def apply(self: FactoredWeight, *others: Any) -> Any:
        return getattr(self.dense(), name)(*_multiplied_out(others))

    return apply


# Python looks operators up on the class, past __getattr__.
for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    for _side in ("", "r"):
        setattr(FactoredWeight, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("neg", "abs", "len"):
    setattr(FactoredWeight, f"__{_name}__", _operator(f"__{_name}__"))
