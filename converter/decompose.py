"""Matrix → U, S, V: truncated, randomised, whitened. Pure functions.

Every decomposition is found in two steps. A :class:`Spectrum` holds the singular values and an
orthonormal basis of one side of W, the shorter one where there is a choice: enough to choose ranks
by, small enough to keep. `Spectrum.factors` then projects W on the leading directions. All accept a
leading group axis (G, m, n).

The exact basis is taken from the eigenvectors of W Wᵀ in float64, whose rounding (1e-16 relative to
the largest squared singular value) is that of a float32 SVD; matrices already in float64 go through
`torch.linalg.svd`. The randomised basis is subspace iteration (Halko, Martinsson and Tropp 2011,
algorithm 4.4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from converter.errors import StiefelError

OVERSAMPLING = 16  # extra directions that the randomised range finder carries
POWER_STEPS = 4  # trained kernels have slowly falling spectra: two steps lose about 1 % of energy
RANDOMISED_BELOW = 0.2  # of full rank: above it the exact decomposition is as fast
EXACT_BELOW = 1024  # matrices with a side shorter than this are always decomposed exactly


class Factors(NamedTuple):
    """One decomposition: U (m, r), S (r,), V (n, r), or with a leading group axis."""

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.S.shape[-1]

    def matrix(self) -> Tensor:
        """U diag(S) Vᵀ, (m, n) or (G, m, n)."""
        return (self.U * self.S.unsqueeze(-2)) @ self.V.mT

    def head(self, rank: int) -> Factors:
        """The first `rank` directions."""
        return Factors(self.U[..., :rank], self.S[..., :rank], self.V[..., :rank])

    # Enough of a matrix's manners for a Spectrum to project the product without forming it.

    @property
    def mT(self) -> Factors:  # noqa: N802
        """The factors of the transpose."""
        return Factors(self.V, self.S, self.U)

    @property
    def shape(self) -> torch.Size:
        """(m, n) or (G, m, n)."""
        return torch.Size((*self.U.shape[:-1], self.V.shape[-2]))

    @property
    def dtype(self) -> torch.dtype:
        """Of all three."""
        return self.U.dtype

    def to(self, *args: Any, **kwargs: Any) -> Factors:
        """As Tensor.to, of all three."""
        return Factors(*(t.to(*args, **kwargs) for t in self))

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.U @ (self.S.unsqueeze(-1) * (self.V.mT @ other))


@dataclass(frozen=True)
class Spectrum:
    """Leading singular values of a matrix and the directions that belong to them.

    Attributes:
        values: (k,) or (G, k), descending; of W, or of W C^{1/2} where it was whitened. float64.
        basis: (m, k) left or, where `right`, (n, k) right singular vectors; float32 or float64.
        energy: the squared Frobenius norm over all singular values, also those left out.
        right: which side the basis spans.
        whitened: whether the values are those of W C^{1/2}.
        origin: a fingerprint of W, to tell whether the spectrum is still W's.
    """

    values: Tensor
    basis: Tensor
    energy: float
    right: bool = False
    whitened: bool = False
    origin: tuple[float, ...] = ()

    def reaches(self, W: Tensor | Factors, rank: int) -> bool:
        """Whether this is the spectrum of the very same W, and goes as far as `rank`."""
        return rank <= self.values.shape[-1] and self.origin == fingerprint(W)

    def error(self, rank: int) -> float:
        """Relative Frobenius error ‖W − W_r‖ / ‖W‖ (of W C^{1/2} where whitened), 0 to 1."""
        return float(self.errors()[rank - 1])

    def errors(self) -> Tensor:
        """The relative errors of every rank 1 … k, float64 (k,)."""
        kept = self.values.square().reshape(-1, self.values.shape[-1]).sum(0).cumsum(0)
        if self.energy == 0:
            return torch.zeros_like(kept)
        tail = (1 - kept / self.energy).clamp(min=0)
        # Differences of sums that round to nothing are nothing.
        return torch.where(tail < 1e-12, 0.0, tail).sqrt()

    def factors(self, W: Tensor | Factors, rank: int) -> Factors:
        """Project W (m, n) on the first `rank` directions: the factors in W's dtype.

        In exact arithmetic the product is U_r U_rᵀ W: the best rank-r approximation of W in the
        Frobenius norm, or in the norm ‖(W − W_r) C^{1/2}‖ when whitened.
        """
        basis = self.basis[..., :rank]
        wide = W.to(basis.dtype)
        other = (wide if self.right else wide.mT) @ basis
        if self.whitened:
            return _reduce(basis, other).to(W.dtype)
        # The columns of `other` are orthogonal already; QR removes the rounding of small ones.
        Q, R = torch.linalg.qr(other)
        S = R.diagonal(dim1=-2, dim2=-1)
        Q = Q * torch.where(S < 0, -1.0, 1.0).unsqueeze(-2).to(Q.dtype)
        U, V = (Q, basis) if self.right else (basis, Q)
        return Factors(U, S.abs(), V).to(W.dtype)

    def to(self, device: torch.device) -> Spectrum:
        """The same on another device."""
        return replace(self, values=self.values.to(device), basis=self.basis.to(device))


def decompose(
    W: Tensor | Factors,
    rank: int,
    second_moment: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Factors:
    """The rank-`rank` factors of W (m, n) or (G, m, n), in W's dtype and on its device.

    W may itself be given as factors, to be lowered in rank without being multiplied out.

    Exact, or randomised where the rank is small against a large matrix. With `second_moment`
    C = E[x xᵀ] (n, n) or (G, n, n), truncated in the norm ‖(W − W_r) C^{1/2}‖_F.

    Raises:
        StiefelError: the rank is not between 1 and min(m, n), or W is not finite.
    """
    return spectrum(W, rank, second_moment, generator).factors(W, rank)


def spectrum(
    W: Tensor | Factors,
    rank: int | None = None,
    second_moment: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """The spectrum of W: whole, or when `rank` is given perhaps only that many directions."""
    full = min(W.shape[-2:])
    _check(W, full if rank is None else rank)
    origin, W = fingerprint(W), W.to(_working(W.dtype))
    if isinstance(W, Factors):
        found = _inner_spectrum(W, second_moment)
    elif second_moment is not None:
        found = _whitened_spectrum(W, second_moment)
    elif rank is not None and full >= EXACT_BELOW and rank < RANDOMISED_BELOW * full:
        found = _randomised_spectrum(W, rank, generator)
    else:
        found = _exact_spectrum(W)
    return replace(found, origin=origin)


def fingerprint(W: Tensor | Factors) -> tuple[float, ...]:
    """A few sums that change when W does; the same device gives the same."""
    tensors = W if isinstance(W, Factors) else (W,)
    sums = [(t.norm(dtype=torch.float64), t.double().sum(), t[..., :1].norm()) for t in tensors]
    return tuple(float(value) for three in sums for value in three)


def truncated(W: Tensor, rank: int) -> Factors:
    """The best rank-`rank` approximation of W (m, n) or (G, m, n) in the Frobenius norm."""
    _check(W, rank)
    return _exact_spectrum(W.to(_working(W.dtype))).factors(W, rank)


def randomised(W: Tensor, rank: int, generator: torch.Generator | None = None) -> Factors:
    """A near-best rank-`rank` approximation of W, in time proportional to m·n·rank."""
    _check(W, rank)
    return _randomised_spectrum(W.to(_working(W.dtype)), rank, generator).factors(W, rank)


def whitened(W: Tensor, second_moment: Tensor, rank: int) -> Factors:
    """The best rank-`rank` W_r in the norm ‖(W − W_r) C^{1/2}‖_F for C (n, n): U_r U_rᵀ W.

    U_r are the leading left singular vectors of W C^{1/2}; no inverse of C is needed.
    """
    _check(W, rank)
    return _whitened_spectrum(W.to(_working(W.dtype)), second_moment).factors(W, rank)


def singular_values(W: Tensor, second_moment: Tensor | None = None) -> Tensor:
    """All singular values of W, or of W C^{1/2}, descending, float64 (k,) or (G, k)."""
    _check(W, 1)
    if second_moment is not None:
        return _whitened_spectrum(W.to(_working(W.dtype)), second_moment).values
    if W.dtype == torch.float64:
        return torch.linalg.svdvals(W)
    short = _short(W).double()
    return torch.linalg.eigvalsh(short @ short.mT).clamp(min=0).sqrt().flip(-1)


def square_root(second_moment: Tensor) -> Tensor:
    """A symmetric C^{1/2} of a positive semidefinite C (n, n), float64; rounding below 0 is 0."""
    values, vectors = torch.linalg.eigh(second_moment.double())
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def _check(W: Tensor, rank: int) -> None:
    full = min(W.shape[-2:])
    if not 1 <= rank <= full:
        raise StiefelError(
            f"rank {rank} is not possible for a {W.shape[-2]}×{W.shape[-1]} matrix: "
            f"choose 1 to {full}"
        )
    if not all(torch.isfinite(t).all() for t in (W if isinstance(W, Factors) else (W,))):
        raise StiefelError("a weight holds NaN or infinity and cannot be factored")


def _working(dtype: torch.dtype) -> torch.dtype:
    """Half precision is decomposed in float32."""
    return dtype if dtype == torch.float64 else torch.float32


def _short(W: Tensor) -> Tensor:
    """W or its transpose, whichever has fewer rows."""
    return W if W.shape[-2] <= W.shape[-1] else W.mT


def _exact_spectrum(W: Tensor) -> Spectrum:
    right = W.shape[-2] > W.shape[-1]
    short = _short(W)
    if W.dtype == torch.float64:
        basis, values, _ = torch.linalg.svd(short, full_matrices=False)
    else:
        basis, values = _gram_basis(short)
    return Spectrum(values, basis.to(W.dtype), float(values.square().sum()), right)


def _inner_spectrum(factors: Factors, second_moment: Tensor | None) -> Spectrum:
    """The spectrum of U diag(S) Vᵀ, whose U and V need not be orthonormal: that of an r×r core."""
    Q, R = torch.linalg.qr(factors.U * factors.S.unsqueeze(-2))
    if second_moment is not None:
        inner = _whitened_spectrum(R @ factors.V.mT, second_moment)
    else:
        inner = _exact_spectrum(R @ torch.linalg.qr(factors.V).R.mT)
    return replace(inner, basis=Q @ inner.basis)


def _gram_basis(short: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of a wide matrix, from the eigenvectors of its Gram."""
    short = short.double()
    values, vectors = torch.linalg.eigh(short @ short.mT)
    return vectors.flip(-1), values.flip(-1).clamp(min=0).sqrt()


def _randomised_spectrum(W: Tensor, rank: int, generator: torch.Generator | None) -> Spectrum:
    right = W.shape[-2] > W.shape[-1]
    short = _short(W)
    # A fixed seed: the same weights always give the same factors.
    generator = generator or torch.Generator(W.device).manual_seed(0)
    width = min(rank + OVERSAMPLING, short.shape[-2])
    start = (*short.shape[:-2], short.shape[-1], width)
    Y = torch.randn(start, generator=generator, device=W.device, dtype=short.dtype)
    Q = torch.linalg.qr(short @ Y).Q
    for _ in range(POWER_STEPS):
        Q = torch.linalg.qr(short @ (short.mT @ Q)).Q
    rotation, values = _gram_basis(Q.mT @ short)
    basis = (Q @ rotation.to(Q.dtype))[..., :rank]
    energy = float(short.double().square().sum())
    return Spectrum(values[..., :rank], basis.to(W.dtype), energy, right)


def _whitened_spectrum(W: Tensor, second_moment: Tensor) -> Spectrum:
    n = W.shape[-1]
    if second_moment.shape[-2:] != (n, n):
        raise StiefelError(
            f"second moment {tuple(second_moment.shape)} does not fit a weight matrix "
            f"{tuple(W.shape)}: it should be ({n}, {n})"
        )
    C, W64 = second_moment.to(W.device).double(), W.double()
    if W.shape[-2] <= n:
        values, vectors = torch.linalg.eigh(W64 @ C @ W64.mT)
        values, basis = values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)
    else:
        # W C Wᵀ would be m×m of rank n: go by the shorter side of W C^{1/2}.
        basis, values, _ = torch.linalg.svd(W64 @ square_root(C), full_matrices=False)
    energy = float(values.square().sum())
    return Spectrum(values, basis.to(W.dtype), energy, whitened=True)


def _reduce(basis: Tensor, other: Tensor) -> Factors:
    """basis @ otherᵀ (m, r)·(r, n) as a thin SVD, for an orthonormal basis."""
    Q, R = torch.linalg.qr(other)
    P, S, Zh = torch.linalg.svd(R.mT.double())
    return Factors(basis @ P.to(basis.dtype), S.to(basis.dtype), Q @ Zh.mT.to(basis.dtype))
