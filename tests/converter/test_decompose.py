"""Decompositions against the theory: Eckart–Young, its whitened form, and torch's own SVD."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converter import decompose as d
from converter.errors import StiefelError

SHAPES = st.sampled_from([(7, 7), (12, 5), (5, 12), (1, 6), (6, 1), (3, 8, 6), (2, 6, 8)])


def decaying(m: int, n: int, power: float = 1.0, dtype: torch.dtype = torch.float64):
    """A matrix whose singular values fall as 1/i^power."""
    k = min(m, n)
    left, right = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64)).Q, torch.randn(n, k)
    values = torch.arange(1, k + 1, dtype=torch.float64) ** -power
    return (left * values @ torch.linalg.qr(right.double()).Q.mT).to(dtype)


def moment(n: int, rank: int | None = None):
    """A second moment E[x xᵀ] of inputs that span `rank` directions, widely spread."""
    x = torch.randn(4 * n, n).double() * torch.logspace(0, -2, n).double()
    if rank:
        x = x[:, :rank] @ torch.randn(rank, n).double()
    return x.mT @ x / len(x)


def orthonormal(Q):
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).norm()


@given(SHAPES, st.sampled_from([torch.float64, torch.float32]), st.data())
def test_truncation_is_the_best_there_is(shape, dtype, data):
    W = torch.randn(shape, dtype=dtype)
    rank = data.draw(st.integers(1, min(shape[-2:])))
    found = d.decompose(W, rank)
    values = torch.linalg.svdvals(W.double())
    best = values[..., rank:].square().sum().sqrt()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert abs((W - found.matrix()).double().norm() - best) < tolerance * W.norm()
    torch.testing.assert_close(found.S.double(), values[..., :rank], atol=tolerance, rtol=tolerance)
    assert orthonormal(found.U) < 10 * tolerance
    assert orthonormal(found.V) < 10 * tolerance
    assert found.U.dtype == found.S.dtype == found.V.dtype == dtype


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
@pytest.mark.parametrize("spanned", [None, 3], ids=["full", "singular"])
def test_whitened_truncation_is_the_best_for_the_inputs(shape, spanned):
    W, C = torch.randn(shape).double(), moment(shape[1], spanned)
    root = d.square_root(C)
    torch.testing.assert_close(root @ root, C)
    for rank in (1, 3, 5):
        found = d.decompose(W, rank, C)
        best = torch.linalg.svdvals(W @ root)[rank:].square().sum().sqrt()
        assert abs(((W - found.matrix()) @ root).norm() - best) < 1e-7 * W.norm()
        # No other projection of W does better, and its singular values are its own.
        torch.testing.assert_close(found.matrix(), found.U @ found.U.mT @ W)
        torch.testing.assert_close(found.S, torch.linalg.svdvals(found.matrix())[:rank])
        plain = d.decompose(W, rank).matrix()
        assert ((W - plain) @ root).norm() >= best * (1 - 1e-9)


def test_white_inputs_change_nothing():
    W = torch.randn(8, 5).double()
    white = d.decompose(W, 3, torch.eye(5).double())
    torch.testing.assert_close(white.matrix(), d.decompose(W, 3).matrix())


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_randomised_is_as_good_as_exact(shape, power):
    W = decaying(*shape, power, torch.float32)
    exact = d._exact_spectrum(W).factors(W, 20)
    found = d._randomised_spectrum(W, 20, None).factors(W, 20)
    lost = (W - exact.matrix()).norm()
    # Of a spectrum that falls fast so little is left that float32's rounding shows in it.
    assert (W - found.matrix()).norm() < 1.005 * lost
    assert orthonormal(found.U) < 1e-5
    assert orthonormal(found.V) < 1e-5
    again = d._randomised_spectrum(W, 20, None).factors(W, 20)
    assert torch.equal(again.U, found.U), "the same weight gives the same factors"
    assert (found.S.diff() <= 1e-6).all()


def test_large_matrices_take_the_randomised_road_and_stay_near_the_best(monkeypatch):
    monkeypatch.setattr(d, "EXACT_BELOW", 64)
    taken = []
    road = d._randomised_spectrum
    monkeypatch.setattr(d, "_randomised_spectrum", lambda *a: taken.append(1) or road(*a))
    W = decaying(100, 80, 0.5, torch.float32)
    found, values = d.spectrum(W, 10), torch.linalg.svdvals(W.double())
    assert taken == [1]
    assert found.values.shape == (10,)
    torch.testing.assert_close(found.values, values[:10], rtol=1e-3, atol=0)
    assert found.error(10) == pytest.approx(float(values[10:].norm() / values.norm()), rel=1e-3)
    d.spectrum(W, 40), d.spectrum(W)
    assert taken == [1], "exact where the rank is not small"


@given(SHAPES, st.booleans())
def test_expected_errors_are_the_errors_made(shape, white):
    W = torch.randn(shape).double()
    C = moment(shape[-1]) if white and len(shape) == 2 else None
    root = torch.eye(shape[-1]).double() if C is None else d.square_root(C)
    found = d.spectrum(W, second_moment=C)
    for rank in range(1, min(shape[-2:]) + 1):
        made = ((W - found.factors(W, rank).matrix()) @ root).norm() / (W @ root).norm()
        assert found.error(rank) == pytest.approx(float(made), abs=1e-7)
    best = torch.linalg.svdvals(W @ root)[..., : found.values.shape[-1]]
    torch.testing.assert_close(best, found.values, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("spread", [1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize("size", [40, 520], ids=["squared in float64", "in float32"])
def test_full_rank_is_exact_to_rounding_however_ill_conditioned(size, spread):
    left, right = (torch.linalg.qr(torch.randn(size, size).double()).Q for _ in range(2))
    W = (left * torch.logspace(0, torch.tensor(spread).log10(), size).double() @ right).float()
    found = d.decompose(W, size)
    assert (found.matrix() - W).norm() < 5e-6 * W.norm()
    assert orthonormal(found.U) < 1e-3
    assert orthonormal(found.V) < 1e-3


@pytest.mark.parametrize("white", [False, True])
def test_factors_are_lowered_without_multiplying_them_out(white, monkeypatch):
    U, V, S = torch.randn(30, 6).double(), torch.randn(20, 6).double(), torch.rand(6).double()
    wide, C = d.Factors(U, S, V), moment(20) if white else None
    W = wide.matrix()
    monkeypatch.setattr(d.Factors, "matrix", lambda self: pytest.fail("W was formed"))
    found = d.decompose(wide, 3, C)
    monkeypatch.undo()
    torch.testing.assert_close(found.matrix(), d.decompose(W, 3, C).matrix(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(d.decompose(wide, 6, C).matrix(), W)


def test_the_output_moment_alone_gives_the_whitened_directions():
    W, C = torch.randn(5, 9).double(), moment(9)
    found = d.output_spectrum(W @ C @ W.mT, torch.float64)
    torch.testing.assert_close(found.factors(W, 2).matrix(), d.decompose(W, 2, C).matrix())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_decomposed_in_single_and_come_back_half(dtype):
    W = torch.randn(12, 9).to(dtype)
    found = d.decompose(W, 4)
    assert {t.dtype for t in found} == {dtype}
    best = torch.linalg.svdvals(W.double())[4:].norm()
    assert (found.to(torch.float64).matrix() - W.double()).norm() < 1.02 * best


def test_zero_and_rank_deficient_matrices_decompose():
    zero = d.decompose(torch.zeros(6, 4), 2)
    assert torch.equal(zero.matrix(), torch.zeros(6, 4))
    assert d.spectrum(torch.zeros(6, 4)).error(1) == 0
    W = torch.outer(torch.arange(6.0), torch.ones(4))
    torch.testing.assert_close(d.decompose(W, 3).matrix(), W, atol=1e-5, rtol=1e-5)


def test_a_spectrum_knows_its_own_matrix():
    W = torch.randn(8, 6)
    found = d.spectrum(W)
    assert found.reaches(W.clone(), 6)
    assert not found.reaches(W, 7)
    assert not found.reaches(W + 1e-3 * torch.randn(8, 6), 2)
    assert not found.reaches(W.flip(0), 2)
    assert not found.reaches(W.flip(1), 2)
    assert found.reaches(W.double() * (1 + 1e-12), 6), (
        "rounding on another device is no other matrix"
    )
    factors = d.decompose(W, 3)
    assert d.spectrum(factors).reaches(factors, 3)
    assert not d.spectrum(factors).reaches(factors.head(2), 2)


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_impossible_ranks_and_broken_weights_are_refused(rank):
    with pytest.raises(StiefelError, match=rf"rank {rank} is not possible for a 6×4 matrix"):
        d.decompose(torch.randn(6, 4), rank)
    with pytest.raises(StiefelError, match="NaN or infinity"):
        d.decompose(torch.full((6, 4), float("nan")), 2)
    with pytest.raises(StiefelError, match=r"should be \(4, 4\)"):
        d.decompose(torch.randn(6, 4), 2, torch.eye(3))
