"""Matrix → U, S, V: truncated, randomised, whitened. Pure functions.

Every decomposition is found in two steps. A :class:`Spectrum` holds the singular values and an
orthonormal basis of one side of W, the shorter one where there is a choice: enough to choose ranks
by, small enough to keep. `Spectrum.factors` then projects W on the leading directions. All accept a
leading group axis (G, m, n).

The basis comes from the short Gram matrix W Wᵀ: all its eigenvectors, or by subspace iteration
(Halko, Martinsson and Tropp 2011, algorithm 4.4) when few are wanted. Squaring costs precision in
small singular values, so the projection is checked, and corrected by an SVD of its r×r core where
that matters: the factors are good to the rounding of W's own precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from converter.errors import StiefelError

OVERSAMPLING = 16  # extra directions that subspace iteration carries
POWER_STEPS = 6  # cheap on the Gram matrix; spectra of trained kernels fall slowly
RANDOMISED_BELOW = 0.3  # of full rank: above it all eigenvectors cost as much
EXACT_BELOW = 1024  # matrices with a side shorter than this are always decomposed exactly
DOUBLE_BELOW = 512  # short sides whose eigenvectors in float64 cost next to nothing


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
        # Devices add up in orders of their own: what differs by rounding is the same.
        sums = fingerprint(W)
        same = len(sums) == len(self.origin) and all(
            math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
            for a, b in zip(sums, self.origin, strict=True)
        )
        return same and rank <= self.values.shape[-1]

    def error(self, rank: int) -> float:
        """Relative Frobenius error ‖W − W_r‖ / ‖W‖ (of W C^{1/2} where whitened), 0 to 1."""
        return float(self.errors()[rank - 1])

    def errors(self) -> Tensor:
        """The relative errors of every rank 1 … k, float64 (k,), on the CPU."""
        squares = self.values.cpu().square().reshape(-1, self.values.shape[-1]).sum(0)
        if self.energy == 0:
            return torch.zeros_like(squares)
        unknown = max(self.energy - float(squares.sum()), 0.0)
        tail = squares.flip(0).cumsum(0).flip(0) - squares + unknown
        return (tail.clamp(min=0) / self.energy).sqrt()

    def factors(self, W: Tensor | Factors, rank: int) -> Factors:
        """Project W (m, n) on the first `rank` directions: the factors in W's dtype.

        In exact arithmetic the product is U_r U_rᵀ W: the best rank-r approximation of W in the
        Frobenius norm, or in the norm ‖(W − W_r) C^{1/2}‖ when whitened.
        """
        basis = _orthonormal(self.basis[..., :rank])
        wide = W.to(basis.dtype)
        Q, R = torch.linalg.qr((wide if self.right else wide.mT) @ basis)
        S = R.diagonal(dim1=-2, dim2=-1)
        if self.whitened or self._blurred(R, rank):
            # The projection basis Rᵀ Qᵀ is no SVD yet: that of its core makes it one.
            P, S, Zh = torch.linalg.svd(R.mT)
            basis, Q = basis @ P, Q @ Zh.mT
        else:
            Q = Q * torch.where(S < 0, -1.0, 1.0).to(Q.dtype).unsqueeze(-2)
        found = Factors(basis, S.abs(), Q).to(W.dtype)
        return found.mT if self.right else found

    def _blurred(self, R: Tensor, rank: int) -> bool:
        """Whether R is too far from diagonal to be taken for S.

        It is diagonal but for rounding in the Gram matrix, which is harmless where it drowns in
        what truncation loses anyway.
        """
        off = (R - torch.diag_embed(R.diagonal(dim1=-2, dim2=-1))).norm()
        lost = self.error(rank) * self.energy**0.5
        return bool(off > max(1e-3 * lost, 8 * torch.finfo(R.dtype).eps * self.energy**0.5))

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
    *,
    output_moment: Tensor | None = None,
) -> Spectrum:
    """The spectrum of W: whole, or when `rank` is given perhaps only that many directions.

    Whitened where C (n, n) is given as `second_moment`, or W C Wᵀ (m, m) as `output_moment`.
    """
    full = min(W.shape[-2:])
    _check(W, full if rank is None else rank)
    origin, W = fingerprint(W), W.to(_working(W.dtype))
    if output_moment is not None:
        found = output_spectrum(output_moment, W.dtype)
    elif isinstance(W, Factors):
        found = _inner_spectrum(W, second_moment)
    elif second_moment is not None:
        found = _whitened_spectrum(W, second_moment)
    elif rank is not None and full >= EXACT_BELOW and rank < RANDOMISED_BELOW * full:
        found = _randomised_spectrum(W, rank, generator)
    else:
        found = _exact_spectrum(W)
    return replace(found, origin=origin)


def fingerprint(W: Tensor | Factors) -> tuple[float, ...]:
    """A few sums that change when W does: its norm, and waves along its two sides."""
    tensors = W if isinstance(W, Factors) else (W,)
    sums = []
    for t in tensors:
        norm = float(t.norm(dtype=torch.float64))
        sides = [t.sum(axis, dtype=torch.float64).flatten() for axis in range(-min(t.ndim, 2), 0)]
        sums += [norm, *(_wave(side) / (norm or 1.0) for side in sides)]
    return tuple(sums)


def _wave(values: Tensor) -> float:
    return float(values @ torch.arange(len(values), dtype=values.dtype, device=values.device).cos())


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
    big = short.shape[-2] >= DOUBLE_BELOW
    if W.dtype == torch.float64:
        basis, values, _ = torch.linalg.svd(short, full_matrices=False)
    else:
        basis, values = _gram_basis(_gram(short) if big else _gram(short.double()))
        # Half of the spectrum in the rounding of the Gram matrix is too much: square in float64.
        if big and (values[..., values.shape[-1] // 2] < 3e-3 * values[..., 0]).any():
            basis, values = _gram_basis(_gram(short.double()))
    return Spectrum(values, basis.to(W.dtype), float(values.square().sum()), right)


def _gram(short: Tensor) -> Tensor:
    """W Wᵀ; of a large one only the lower blocks are multiplied."""
    rows = short.shape[-2]
    if short.ndim > 2 or rows < 2048:
        return short @ short.mT
    gram = short.new_empty(rows, rows)
    block = rows // 8
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        gram[start:stop, :stop] = short[start:stop] @ short[:stop].mT
        gram[:start, start:stop] = gram[start:stop, :start].mT
    return gram


def _gram_basis(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of a matrix from its Gram; values in float64."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(-1), values.flip(-1).clamp(min=0).double().sqrt()


def _orthonormal(basis: Tensor) -> Tensor:
    """One Newton–Schulz step: takes columns orthonormal to 1e-5 to orthonormal in rounding."""
    return 1.5 * basis - 0.5 * basis @ (basis.mT @ basis)


def _inner_spectrum(factors: Factors, second_moment: Tensor | None) -> Spectrum:
    """The spectrum of U diag(S) Vᵀ, whose U and V need not be orthonormal: that of an r×r core."""
    Q, R = torch.linalg.qr(factors.U * factors.S.unsqueeze(-2))
    if second_moment is not None:
        inner = _whitened_spectrum(R @ factors.V.mT, second_moment)
    else:
        inner = _exact_spectrum(R @ torch.linalg.qr(factors.V).R.mT)
    return replace(inner, basis=Q @ inner.basis)


def _randomised_spectrum(W: Tensor, rank: int, generator: torch.Generator | None) -> Spectrum:
    gram = _gram(_short(W))
    # A fixed seed: the same weights always give the same factors.
    generator = generator or torch.Generator(W.device).manual_seed(0)
    shape = (*gram.shape[:-1], min(rank + OVERSAMPLING, gram.shape[-1]))
    Q = torch.randn(shape, generator=generator, device=W.device, dtype=W.dtype)
    for _ in range(POWER_STEPS):
        Q = torch.linalg.qr(gram @ Q).Q
    rotation, values = _gram_basis(Q.mT @ (gram @ Q))
    basis = (Q @ rotation)[..., :rank]
    energy = float(W.norm(dtype=torch.float64).square())
    return Spectrum(values[..., :rank], basis, energy, W.shape[-2] > W.shape[-1])


def _whitened_spectrum(W: Tensor, second_moment: Tensor) -> Spectrum:
    n = W.shape[-1]
    if second_moment.shape[-2:] != (n, n):
        raise StiefelError(
            f"second moment {tuple(second_moment.shape)} does not fit a weight matrix "
            f"{tuple(W.shape)}: it should be ({n}, {n})"
        )
    C, W64 = second_moment.to(W.device).double(), W.double()
    if W.shape[-2] <= n:
        return output_spectrum(W64 @ C @ W64.mT, W.dtype)
    # W C Wᵀ would be m×m of rank n: go by the shorter side of W C^{1/2}.
    basis, values, _ = torch.linalg.svd(W64 @ square_root(C), full_matrices=False)
    return Spectrum(values, basis.to(W.dtype), float(values.square().sum()), whitened=True)


def output_spectrum(output_moment: Tensor, dtype: torch.dtype = torch.float32) -> Spectrum:
    """The whitened spectrum of W from its outputs' second moment E[(W x)(W x)ᵀ] = W C Wᵀ (m, m).

    For matrices so wide that C itself would not fit. The basis is of `dtype`.
    """
    basis, values = _gram_basis(output_moment.double())
    return Spectrum(values, basis.to(dtype), float(values.square().sum()), whitened=True)
