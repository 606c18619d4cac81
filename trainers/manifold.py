"""U and V kept on the Stiefel manifold, S nonnegative; rank cut with the optimizer's state along.

Sources: retractions and the tangent projection, Absil, Mahony & Sepulchre, "Optimization Algorithms
on Matrix Manifolds" (2008), sections 3.5.7, 4.1.1 and 8.1.3; the Newton–Schulz iteration, Higham,
"Functions of Matrices" (2008), section 8.3.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from converter.factors import Factored, Factors, factored_layers

Retraction = Callable[[Tensor], Tensor]

SMALLEST_S = 1e-6
"""S is kept at or above this: nonnegative, and never so small that its direction cannot return."""

# Above this departure S no longer holds the singular values well enough to choose by.
_DRIFT = 1e-3
# No bound, and yet zero times a second moment of zero.
_UNBOUNDED = 1e30
# The states in which torch's optimizers keep a running mean of the gradient.
_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


def tied_layers(model: nn.Module) -> dict[str, list[Factored]]:
    """The factored layers that share U, S and V, under the name of the first; most are alone."""
    found: dict[tuple[int, ...], tuple[str, list[Factored]]] = {}
    for name, layer in factored_layers(model).items():
        key = tuple(id(factor) for factor in layer.factors())
        found.setdefault(key, (name, []))[1].append(layer)
    return dict(found.values())


def departure(U: Tensor) -> Tensor:
    """‖UᵀU − I‖_F of U (..., m, r): how far the columns are from orthonormal, (...)."""
    return torch.linalg.matrix_norm(_gram(U) - _identity(U))


def newton_schulz(U: Tensor) -> Tensor:
    """One step towards the nearest orthonormal U (..., m, r): U ← 1.5 U − 0.5 U UᵀU.

    Singular values σ go to 1.5σ − 0.5σ³: the error of a σ near 1 is squared, and every σ in (0, √3)
    converges to 1. A U of larger ones is first shrunk so that σ² ≤ 2, since σ > √3 would diverge;
    this needs no look at the values from the host.
    """
    gram = _gram(U)
    square = gram @ gram
    # The largest σ² is at most 1 + |UᵀU − I|, tight near the manifold, and |UᵀU|, tight far inside
    # it. In Schatten's 4-norm, |A|⁴ = ‖A²‖²: Frobenius' is too large by √r, this by its root, and
    # wide layers that strayed were shrunk by it more than they grew back, and vanished.
    off = square - 2 * gram + _identity(U)  # (UᵀU − I)²
    bound = torch.minimum(1 + _root_norm(off), _root_norm(square))
    shrink = (2 / bound).clamp(max=1)
    return shrink.sqrt() * (1.5 * U - 0.5 * shrink * (U @ gram))


def qr(U: Tensor) -> Tensor:
    """The Q factor of U (..., m, r), with signs so that R has a positive diagonal."""
    Q, R = torch.linalg.qr(U)
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).to(U.dtype)
    return Q * signs.unsqueeze(-2)


def polar(U: Tensor) -> Tensor:
    """U (UᵀU)^(−1/2), the orthonormal matrix nearest to U (..., m, r) in Frobenius norm."""
    left, _, right = torch.linalg.svd(U, full_matrices=False)
    return left @ right


RETRACTIONS: dict[str, Retraction] = {"newton-schulz": newton_schulz, "qr": qr, "polar": polar}


def tangent(M: Tensor, U: Tensor) -> Tensor:
    """M (..., m, r) projected on the tangent space at an orthonormal U: M − U sym(UᵀM)."""
    UtM = U.mT @ M
    return M - U @ (0.5 * (UtM + UtM.mT))


class Manifold:
    """The factors of a model, batched by shape so that one product serves many layers.

    Build it anew after a truncation, which replaces Parameters.
    """

    def __init__(self, model: nn.Module):
        layers = factored_layers(model).values()
        groups: dict[tuple, list[nn.Parameter]] = defaultdict(list)
        for factor in _once(p for layer in layers for p in (layer.U, layer.V) if p.requires_grad):
            groups[factor.shape, factor.dtype, factor.device].append(factor)
        self._groups = list(groups.values())
        self._S = list(_once(layer.S for layer in layers if layer.S.requires_grad))

    @torch.no_grad()
    def clamp_(self) -> None:
        """S ← max(S, 1e-6)."""
        if self._S:
            torch._foreach_clamp_min_(self._S, SMALLEST_S)

    @torch.no_grad()
    def retract_(self, retraction: Retraction, optimizer: Optimizer | None = None) -> None:
        """Retract every trainable U and V, and project the optimizer's first moments along.

        The first moment (Adam's `exp_avg`, SGD's `momentum_buffer`) is a mean of gradients: the
        part of it normal to the manifold would be undone by the next retraction, so it is projected
        on the tangent space at the new point (vector transport by projection). Adam's second
        moment is an elementwise scale, not a vector of that space, and stays as it is; the first
        stays within what that scale allows.
        """
        for factors in self._groups:
            retracted = retraction(torch.stack(factors))
            torch._foreach_copy_(factors, list(retracted.unbind()))
            if optimizer is not None:
                _project_moments(factors, retracted, optimizer)

    def departure(self) -> float:
        """The largest `departure` of any trainable U or V; 0 without factors. Reads the device."""
        worst = [departure(torch.stack(f).detach()).max() for f in self._groups]
        return float(torch.stack([w.float().cpu() for w in worst]).max()) if worst else 0.0


@torch.no_grad()
def truncate_(
    layer: Factored, rank: int, optimizer: Optimizer | None = None, tied: Iterable[Factored] = ()
) -> float:
    """Keep the `rank` directions with the largest S, in U, S, V and in the optimizer's state.

    While U and V are orthonormal, S holds the singular values whatever training did to it, and the
    dropped directions cost exactly their energy. Where they have drifted, the layer is first
    brought back to its SVD, unchanged as a function, and the moments with it; see `rediagonalise`.
    Grouped layers keep the same directions in every group, by energy summed over the groups.

    Args:
        tied: layers that share the layer's factors; they share the new ones.

    Returns:
        ‖W − W'‖_F / ‖W‖_F, the share that was dropped, 0..1.

    Raises:
        ValueError: `rank` isn't between 1 and the layer's rank.
    """
    if not 1 <= rank <= layer.rank:
        raise ValueError(f"rank {rank} is not between 1 and the layer's rank {layer.rank}")
    if max(departure(layer.U).max(), departure(layer.V).max()) > _DRIFT:
        _rediagonalise_(layer, optimizer)
    energy = direction_energies(layer)
    keep = energy.argsort(descending=True, stable=True)[:rank]
    before = layer.factors()
    layer.truncate_(keep)
    for other in tied:
        other.U, other.S, other.V = layer.factors()
    if optimizer is not None:
        for old, new in zip(before, layer.factors(), strict=True):
            _hand_over(old, new, keep, optimizer)
    total = float(energy.sum())
    return math.sqrt(max(0.0, 1 - float(energy[keep].sum()) / total)) if total else 0.0


def direction_energies(layer: Factored) -> Tensor:
    """S² of each direction (r,) float64, summed over the groups of a grouped layer."""
    energy = layer.S.detach().double().square()
    return energy.reshape(-1, energy.shape[-1]).sum(0)


def rediagonalise(factors: Factors) -> tuple[Factors, tuple[Tensor, Tensor, Tensor]]:
    """The SVD of U diag(S) Vᵀ for any U (..., m, r), S (..., r), V (..., n, r), and what to do
    with gradients.

    U = Q_U R_U and V = Q_V R_V leave an r×r core, R_U diag(S) R_Vᵀ = P Σ Oᵀ, so U' = Q_U P and
    V' = Q_V O: W is never formed, and never changes.

    Returns:
        The new factors, Σ descending, and (T_U, T_S, T_V), each (..., r, r): the gradient with
        respect to U' is G_U T_U with T_U = R_Uᵀ P, likewise T_V = R_Vᵀ O. For S it is G_S (P ∘ O)
        up to the drift and to what G_S does not hold, the off-diagonal of Uᵀ G_W V.
    """
    U, S, V = factors
    (Q_U, R_U), (Q_V, R_V) = torch.linalg.qr(U), torch.linalg.qr(V)
    P, sigma, Ot = torch.linalg.svd((R_U * S.unsqueeze(-2)) @ R_V.mT)
    transports = (R_U.mT @ P, P * Ot.mT, R_V.mT @ Ot.mT)
    return Factors(Q_U @ P, sigma, Q_V @ Ot.mT), transports


def _rediagonalise_(layer: Factored, optimizer: Optimizer | None) -> None:
    """`rediagonalise` in place, the running means transported and the running squares likewise."""
    new, transports = rediagonalise(layer.factors())
    for parameter, value, T in zip(layer.factors(), new, transports, strict=True):
        parameter.copy_(value)
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        for name, tensor in _aligned(state, parameter).items():
            # Squares of independent entries add with squared weights.
            weights = T if name in _FIRST_MOMENTS else T.square()
            if parameter is layer.S:
                tensor.copy_((tensor.unsqueeze(-2) @ weights).squeeze(-2))
            else:
                tensor.copy_(tensor @ weights)


def _project_moments(factors: list[nn.Parameter], points: Tensor, optimizer: Optimizer) -> None:
    for name in _FIRST_MOMENTS:
        states = [optimizer.state.get(p, {}).get(name) for p in factors]
        held = [i for i, state in enumerate(states) if state is not None]
        if held:
            moments = [states[i] for i in held]
            whole = len(held) == len(factors)
            at = points if whole else torch.stack([points[i] for i in held])
            projected = tangent(torch.stack(moments), at)
            squares = [optimizer.state[factors[i]].get("exp_avg_sq") for i in held]
            if squares[0] is not None:
                bound = _adam_bound(*optimizer.defaults["betas"]) * torch.stack(squares).sqrt()
                projected = torch.minimum(torch.maximum(projected, -bound), bound)
            torch._foreach_copy_(moments, list(projected.unbind()))


def _adam_bound(beta1: float, beta2: float) -> float:
    """The largest |m| / √v that Adam's own averages can reach, by Cauchy and Schwarz.

    Projection mixes elements: without the bound, one that never had a gradient (a pixel that is
    always black) would get a moment over a second moment of zero, and be thrown far away.
    """
    if beta1**2 >= beta2:
        return _UNBOUNDED
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


def _aligned(state: dict, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's tensors that are laid out as the parameter is: its moments, not its step."""
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }


def _hand_over(old: nn.Parameter, new: nn.Parameter, keep: Tensor, optimizer: Optimizer) -> None:
    """Let `new` take the place of `old` in the optimizer, its state cut to the directions kept."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        cut = {name: t.index_select(-1, keep) for name, t in _aligned(state, old).items()}
        optimizer.state[new] = {**state, **cut}


def _once(parameters: Iterable[nn.Parameter]) -> Iterable[nn.Parameter]:
    """Each parameter once, in order: layers may share them."""
    return {id(p): p for p in parameters}.values()


def _gram(U: Tensor) -> Tensor:
    return U.mT @ U


def _root_norm(A: Tensor) -> Tensor:
    """√‖A‖_F of A (..., r, r), (..., 1, 1)."""
    return torch.linalg.matrix_norm(A, keepdim=True).sqrt()


def _identity(U: Tensor) -> Tensor:
    return torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
