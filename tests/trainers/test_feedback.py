"""Structured feedback: one matrix read both ways, and how each kind learns."""

import pytest
import torch
from torch import Tensor

from converter.decompose import Factors
from trainers.feedback import (
    DenseFeedback,
    KolenPollack,
    StructuredFeedback,
    fitted_factors,
    kernel_directions,
    random_factors,
)
from trainers.losses import cross_entropy, output_error

D, C, K, N = 12, 5, 3, 8


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _feedback(learned: bool, seed: int = 0) -> StructuredFeedback:
    factors = random_factors(D, C, K, _generator(seed))
    return StructuredFeedback(factors, torch.zeros(C), learned)


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    z = torch.randn(N, D, generator=_generator(1)).requires_grad_()
    y = torch.randint(0, C, (N,), generator=_generator(2))
    error = output_error(torch.randn(N, C, generator=_generator(3)), y)
    return z, y, error


def test_random_factors_are_orthonormal_and_no_wider_than_fits():
    factors = random_factors(D, C, 99, _generator())
    assert factors.U.shape == (D, C)
    for basis in (factors.U, factors.V):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(C))


def test_the_same_generator_draws_the_same_feedback():
    first, second = _feedback(False).state_dict(), _feedback(False).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_read_out_and_feedback_are_one_matrix():
    feedback = _feedback(learned=False)
    B = Factors(feedback.B_U, feedback.B_S, feedback.B_V).matrix()
    z, _, error = _batch()
    torch.testing.assert_close(feedback(z), z @ B)
    torch.testing.assert_close(feedback.back(error), error @ B.mT)


@pytest.mark.parametrize("learned", [False, True])
def test_a_local_error_comes_back_through_the_read_out(learned):
    feedback = _feedback(learned)
    z, y, _ = _batch()
    feedback.local_loss(z, y).backward()
    error = output_error(feedback(z).detach(), y)
    torch.testing.assert_close(z.grad, feedback.back(error).detach() / N)
    assert len(list(feedback.parameters())) == (4 if learned else 0)
    assert all(p.grad is not None for p in feedback.parameters())


@pytest.mark.parametrize(
    "feedback",
    [
        _feedback(learned=False),
        _feedback(learned=True),
        KolenPollack(random_factors(D, C, K, _generator())),
        DenseFeedback(D, C, _generator()),
    ],
    ids=["fixed", "learned", "kolen-pollack", "dense"],
)
def test_the_global_error_reaches_the_features_through_b_alone(feedback):
    z, y, error = _batch()
    feedback.global_loss(z, error, y).backward()
    torch.testing.assert_close(z.grad, feedback.back(error).detach() / N)


def test_dense_feedback_has_the_scale_of_the_error():
    back = DenseFeedback(4000, C, _generator()).back(torch.eye(C))
    assert back.std().item() == pytest.approx(C**-0.5, rel=0.05)


def test_kolen_pollack_matrices_come_to_agree():
    first, second = (random_factors(D, C, K, _generator(seed)) for seed in (0, 5))
    pair = KolenPollack(first, second.U, decay=0.05)
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.1)
    z, y, _ = _batch()

    def agreement() -> float:
        return torch.cosine_similarity(pair.read.flatten(), pair.sent.flatten(), dim=0).item()

    before = agreement()
    for _ in range(300):
        optimizer.zero_grad()
        pair.local_loss(z.detach(), y).backward()
        optimizer.step()
    assert before < 0.5
    assert agreement() > 0.95


def test_fitted_factors_read_out_what_is_linear_in_the_features():
    z = torch.randn(400, D, generator=_generator())
    weight = torch.randn(D, C, generator=_generator(1))
    logits = z @ weight + 3
    factors, bias = fitted_factors(z, logits, C, ridge=1e-9)
    centred = logits - logits.mean(dim=1, keepdim=True)
    torch.testing.assert_close(z @ factors.matrix() + bias, centred, atol=1e-2, rtol=1e-2)
    y = logits.argmax(dim=1)
    assert cross_entropy(z @ factors.matrix() + bias, y) < 0.6 * torch.tensor(C).log()


@pytest.mark.parametrize("value", [0.0, 1e-25, 5.3])
@pytest.mark.parametrize("images", [1, 6])
def test_nothing_is_read_from_features_that_are_the_same_for_all_images(images, value):
    logits = torch.randn(images, C, generator=_generator())
    z = value * (1 + torch.rand(D, generator=_generator(1)))
    factors, bias = fitted_factors(z.expand(images, D), logits, K)
    centred = logits - logits.mean(dim=1, keepdim=True)
    torch.testing.assert_close(factors.matrix(), torch.zeros(D, C), atol=1e-2, rtol=0)
    torch.testing.assert_close(z @ factors.matrix() + bias, centred.mean(dim=0))


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_fitted_factors_follow_the_scale_of_the_features(scale):
    z, logits = (torch.randn(40, n, generator=_generator(n)) for n in (D, C))
    (plain, _), (scaled, _) = fitted_factors(z, logits, K), fitted_factors(scale * z, logits, K)
    torch.testing.assert_close(scaled.matrix() * scale, plain.matrix())


def test_kernel_directions_point_every_tap_of_a_kernel_the_same_way():
    channels = random_factors(4, 2, 2, _generator()).U
    P = kernel_directions(channels, rows=12)
    torch.testing.assert_close(P.mT @ P, torch.eye(2))
    # Rows are ordered (channel, tap).
    torch.testing.assert_close(P.reshape(4, 3, 2)[:, 0], P.reshape(4, 3, 2)[:, 2])
