"""The local losses: values at known points, and gradients against finite differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from trainers import losses


def _normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(_normal(rows, columns, seed=seed)).Q


Y = torch.tensor([0, 2, 1, 2, 0])
TARGET = losses.similarity_target(Y, 3).double()
TERMS = {
    "cross_entropy": (lambda z: losses.cross_entropy(z, Y, 0.1), (5, 3)),
    "similarity_matching": (lambda z: losses.similarity_matching(z, TARGET), (5, 7)),
    "distillation": (lambda h: losses.distillation(h, _normal(5, 2, 3, 3, seed=1)), (5, 2, 3, 3)),
    "alignment": (lambda U: losses.alignment(U, _orthonormal(6, 2).to(U.dtype)), (6, 3)),
    "orthogonality": (losses.orthogonality, (6, 3)),
    "orthogonality of groups": (losses.orthogonality, (2, 6, 3)),
    "cosine": (lambda z: losses.cosine(z, _normal(5, 7, seed=1)), (5, 7)),
    "hoyer": (losses.hoyer, (6,)),
}


@pytest.mark.parametrize("name", TERMS)
def test_gradients_agree_with_finite_differences(name):
    term, shape = TERMS[name]
    assert gradcheck(term, _normal(*shape, seed=2).requires_grad_())


@pytest.mark.parametrize("name", TERMS)
def test_terms_are_float32_scalars_under_autocast(name):
    term, shape = TERMS[name]
    with torch.autocast("cpu", torch.bfloat16):
        value = term(_normal(*shape, seed=2).float())
    assert value.shape == ()
    assert value.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(
        value.double(), term(_normal(*shape, seed=2)), rtol=0.05, atol=0.02, check_dtype=False
    )


def test_the_output_error_is_the_gradient_of_the_summed_cross_entropy():
    logits = _normal(5, 3).requires_grad_()
    (losses.cross_entropy(logits, Y, 0.1) * 5).backward()
    torch.testing.assert_close(losses.output_error(logits.detach(), Y, 0.1), logits.grad)


def test_indices_and_their_one_hot_probabilities_are_the_same_target():
    logits, smooth = _normal(5, 3), losses.probabilities(Y, 3, 0.2).double()
    torch.testing.assert_close(
        losses.cross_entropy(logits, Y, 0.2), losses.cross_entropy(logits, smooth)
    )
    torch.testing.assert_close(smooth.sum(1), torch.ones(5).double())


def test_similarity_is_matched_by_features_that_are_alike_within_and_opposed_between_classes():
    y = torch.tensor([0, 1, 0, 1])
    z = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, 2.0], [-1.0, -2.0]])
    # Between classes −1 instead of 0, eight of the sixteen pairs.
    assert losses.similarity_matching(z, losses.similarity_target(y, 2)).item() == pytest.approx(
        0.5
    )


@given(st.floats(0.1, 10), st.integers(0, 99))
def test_similarity_ignores_scale_and_offset_of_the_features(scale, seed):
    z = _normal(5, 7, seed=seed)
    moved = z * scale + _normal(7, seed=seed + 1)
    torch.testing.assert_close(
        losses.similarity_matching(moved, TARGET), losses.similarity_matching(z, TARGET)
    )


def test_distillation_is_zero_at_the_target_and_one_at_its_mean():
    target = _normal(64, 8, 4, 4) * 3 + 1
    assert losses.distillation(target, target).item() == 0
    mean = losses.distillation(target.mean().expand_as(target), target)
    assert mean.item() == pytest.approx(1, rel=1e-3)


@given(st.floats(0.01, 100))
def test_distillation_does_not_depend_on_the_scale_of_the_features(scale):
    h, target = _normal(4, 6), _normal(4, 6, seed=1)
    torch.testing.assert_close(
        losses.distillation(h * scale, target * scale), losses.distillation(h, target)
    )


def test_a_constant_target_does_not_divide_by_zero():
    assert torch.isfinite(losses.distillation(torch.zeros(4, 3), torch.zeros(4, 3)))


def test_alignment_is_zero_within_the_span_and_one_across_it():
    basis = _orthonormal(8, 8)
    U, rotation = basis[:, :4], _orthonormal(4, 4, seed=3)
    assert losses.alignment(U, (U @ rotation)[:, :2]).item() == pytest.approx(0, abs=1e-12)
    assert losses.alignment(U[:, :2], U).item() == pytest.approx(0, abs=1e-12)
    assert losses.alignment(U, basis[:, 4:]).item() == pytest.approx(1, abs=1e-12)


def test_orthogonality_is_the_squared_departure():
    U = _orthonormal(6, 3)
    assert losses.orthogonality(U).item() == pytest.approx(0, abs=1e-12)
    assert losses.orthogonality(2 * U).item() == pytest.approx(3 * 9)


def test_the_cosine_term_counts_from_zero_alike_to_two_opposed():
    z = _normal(5, 4)
    assert losses.cosine(z, 3 * z).item() == pytest.approx(0, abs=1e-7)
    assert losses.cosine(z, -z).item() == pytest.approx(2, abs=1e-7)


def test_hoyer_goes_from_zero_for_one_direction_to_one_for_all_alike():
    assert losses.hoyer(torch.tensor([0.0, 3.0, 0.0, 0.0])).item() == pytest.approx(0, abs=1e-6)
    assert losses.hoyer(torch.full((4,), 2.0)).item() == pytest.approx(1, abs=1e-6)
    assert losses.hoyer(torch.tensor([2.0])).item() == 0
