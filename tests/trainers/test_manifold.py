import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from converter.factors import FactoredConv2d, FactoredLinear, Factors
from trainers.manifold import (
    RETRACTIONS,
    SMALLEST_S,
    Manifold,
    departure,
    direction_energies,
    newton_schulz,
    polar,
    qr,
    rediagonalise,
    tangent,
    truncate_,
)

shapes = st.tuples(st.integers(1, 9), st.integers(0, 7)).map(lambda t: (t[0] + t[1], t[0]))
seeds = st.integers(0, 2**31 - 1)
groups = st.sampled_from([(), (1,), (3,)])


def orthonormal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64, generator=generator))[0]


def noise(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def linear(m: int, n: int, r: int, seed: int = 0) -> FactoredLinear:
    S = torch.rand(r, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    bias = torch.zeros(m, dtype=torch.float64)
    return FactoredLinear(orthonormal(m, r, seed=seed), S, orthonormal(n, r, seed=seed + 1), bias)


def grouped(r: int = 3, seed: int = 0) -> FactoredConv2d:
    U, V = orthonormal(2, 4 * 3, r, seed=seed), orthonormal(2, 2 * 3, r, seed=seed + 1)
    S = noise(2, r, seed=seed).abs() + 0.1
    return FactoredConv2d(U, S, V, scheme="spatial", kernel_size=(3, 3), padding=(1, 1), groups=2)


@given(shapes, groups, seeds)
def test_departure_is_zero_exactly_on_the_manifold_and_the_frobenius_norm_off_it(shape, lead, seed):
    U = orthonormal(*lead, *shape, seed=seed)
    assert departure(U).shape == lead
    assert departure(U).max() < 1e-13
    scaled = departure(2 * U)  # 4I − I
    torch.testing.assert_close(scaled, torch.full(lead, 3 * shape[1] ** 0.5).double())


@given(shapes, groups, seeds, st.floats(1e-6, 0.05))
def test_newton_schulz_squares_the_departure(shape, lead, seed, size):
    U = orthonormal(*lead, *shape, seed=seed) + size * noise(*lead, *shape, seed=seed) / shape[0]
    before, after = departure(U).max(), departure(newton_schulz(U)).max()
    assert after <= before**2 + 1e-13


@given(shapes, seeds, st.floats(0.01, 100))
def test_newton_schulz_converges_to_the_polar_factor_from_any_full_rank_start(shape, seed, size):
    # Singular values spread over a decade, and scaled far beyond √3 where the bare step diverges.
    m, r = shape
    spread = torch.logspace(-1, 0, r, dtype=torch.float64) * size
    U = (orthonormal(m, r, seed=seed) * spread) @ orthonormal(r, r, seed=seed + 1)
    X = U
    for _ in range(60):
        X = newton_schulz(X)
    torch.testing.assert_close(X, polar(U), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", RETRACTIONS)
@given(shape=shapes, lead=groups, seed=seeds)
def test_retractions_leave_a_point_of_the_manifold_where_it_is(name, shape, lead, seed):
    U = orthonormal(*lead, *shape, seed=seed)
    torch.testing.assert_close(RETRACTIONS[name](U), U, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rank", [16, 128])
@pytest.mark.parametrize("size", [0.01, 0.3, 0.8, 1.2, 3.0])
def test_newton_schulz_brings_back_wide_factors_that_strayed_far(rank, size):
    """Shrunk by a bound that grows with √rank, they would vanish instead."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2 * rank, rank, generator=generator) / (2 * rank) ** 0.5
    for U in (size * qr(noise), qr(noise) + size * noise):
        smallest = torch.linalg.svdvals(U).min()
        for _ in range(25):
            U = newton_schulz(U)
            least = torch.linalg.svdvals(U).min()
            assert least > 0.99 * min(smallest, 0.3)
        assert departure(U) < 1e-4


@pytest.mark.parametrize("retraction", [newton_schulz, qr, polar])
@given(shape=shapes, seed=seeds)
def test_retractions_agree_with_a_tangent_step_to_first_order(retraction, shape, seed):
    # The defining property of a retraction: R(U + tξ) = U + tξ + O(t²).
    U = orthonormal(*shape, seed=seed)
    xi = tangent(noise(*shape, seed=seed), U)
    xi = xi / xi.norm().clamp(min=1e-12)
    for t in (1e-2, 1e-3):
        assert (retraction(U + t * xi) - (U + t * xi)).norm() <= 5 * t**2


@given(shapes, groups, seeds)
def test_the_tangent_projection_is_an_orthogonal_projection_on_the_tangent_space(shape, lead, seed):
    U = orthonormal(*lead, *shape, seed=seed)
    M = noise(*lead, *shape, seed=seed)
    P = tangent(M, U)
    skew = U.mT @ P
    torch.testing.assert_close(skew, -skew.mT, atol=1e-12, rtol=0)
    torch.testing.assert_close(tangent(P, U), P, atol=1e-12, rtol=0)
    torch.testing.assert_close(((M - P) * P).sum(), torch.zeros(()).double(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", RETRACTIONS)
def test_batched_retraction_equals_each_layer_on_its_own(name):
    model = nn.Sequential(linear(6, 5, 3, 1), linear(6, 5, 3, 2), linear(7, 4, 2, 3), grouped())
    for p in model.parameters():
        p.data += 0.02 * noise(*p.shape, seed=9)
    expected = [RETRACTIONS[name](f.detach()) for layer in model for f in (layer.U, layer.V)]
    Manifold(model).retract_(RETRACTIONS[name])
    got = [f.detach() for layer in model for f in (layer.U, layer.V)]
    for want, have in zip(expected, got, strict=True):
        torch.testing.assert_close(have, want, atol=1e-12, rtol=0)


def test_a_shared_tied_or_frozen_layer_is_retracted_once_or_not_at_all():
    shared, frozen = linear(6, 6, 3), linear(6, 6, 3, 5)
    tied = FactoredLinear(*shared.factors())
    frozen.requires_grad_(False)
    for p in (*shared.parameters(), *frozen.parameters()):
        p.data *= 1.1
    once, untouched = newton_schulz(shared.U.detach()), frozen.U.clone()
    Manifold(nn.Sequential(shared, shared, tied, frozen)).retract_(newton_schulz)
    torch.testing.assert_close(shared.U.detach(), once)
    torch.testing.assert_close(frozen.U.detach(), untouched, atol=0, rtol=0)


def test_clamp_brings_a_negative_singular_value_to_the_smallest_positive_one():
    layer = linear(4, 4, 3)
    layer.S.data.copy_(torch.tensor([2.0, -1.0, 0.0]))
    Manifold(layer).clamp_()
    assert layer.S.tolist() == [2.0, SMALLEST_S, SMALLEST_S]


def optimizer_with_state(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("kind", "moment"), [("adamw", "exp_avg"), ("sgd", "momentum_buffer")])
def test_retraction_leaves_the_first_moment_tangent_and_the_second_alone(kind, moment):
    model = nn.Sequential(linear(6, 5, 3), linear(6, 5, 3, 4), grouped())
    optimizer = optimizer_with_state(model, kind)
    for state in optimizer.state.values():
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].fill_(1.0)  # far from where it bounds the first
    second = optimizer.state[model[0].U].get("exp_avg_sq", torch.zeros(())).clone()
    Manifold(model).retract_(polar, optimizer)
    for layer in model:
        for p in (layer.U, layer.V):
            UtM = p.mT @ optimizer.state[p][moment]
            torch.testing.assert_close(UtM, -UtM.mT, atol=1e-12, rtol=0)
            assert optimizer.state[p][moment].norm() > 1e-4
    after = optimizer.state[model[0].U].get("exp_avg_sq", torch.zeros(()))
    torch.testing.assert_close(after, second, atol=0, rtol=0)


@pytest.mark.parametrize("beta1", [0.9, 0.9996])  # the second is no less than the root of β2
def test_an_input_that_never_has_a_gradient_is_not_thrown_by_the_projected_moment(beta1):
    torch.manual_seed(0)
    layer = linear(6, 40, 3)
    betas = (beta1, 0.999)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, betas=betas, weight_decay=0)
    for _ in range(4):
        for p in layer.parameters():
            p.grad = torch.randn_like(p)
        layer.V.grad[:20] = 0
        before = layer.V.detach().clone()
        optimizer.step()
        # Adam's own worst step is lr (1 − β1) / √((1 − β2)(1 − β1²/β2)) ≈ 7.3 lr, bias apart.
        assert (layer.V - before).abs().max() < 0.1
        Manifold(layer).retract_(newton_schulz, optimizer)
    assert departure(layer.V) < 0.01


@given(shapes, shapes, seeds, st.data())
def test_truncation_changes_the_matrix_by_exactly_the_dropped_energy(left, right, seed, data):
    r = min(left[1], right[1])
    layer = linear(left[0], right[0], r, seed)
    layer.S.data[:] = layer.S[torch.randperm(r)]  # training leaves S in no order
    W, S = layer.factors().matrix().detach(), layer.S.detach().clone()
    rank = data.draw(st.integers(1, r))
    dropped = truncate_(layer, rank)
    smallest = S.sort().values[: r - rank]
    error = (layer.factors().matrix().detach() - W).norm()
    torch.testing.assert_close(error, smallest.norm(), atol=1e-10, rtol=0)
    assert dropped == pytest.approx(float(error / W.norm()), abs=1e-7)
    assert layer.rank == rank


@given(seeds, st.floats(0, 0.5))
def test_truncation_of_drifted_factors_is_still_the_best_of_its_rank(seed, drift):
    layer = linear(9, 7, 5, seed)
    layer.U.data += drift * noise(9, 5, seed=seed)
    layer.V.data += drift * noise(7, 5, seed=seed + 1)
    W = layer.factors().matrix().detach()
    best = torch.linalg.svdvals(W)[3:].norm()
    truncate_(layer, 3)
    # Within the tolerated drift the old factors are used as they are.
    assert (layer.factors().matrix() - W).norm() <= best * (1 + 1e-6) + 2e-3 * W.norm()


def test_grouped_truncation_keeps_the_directions_with_most_energy_over_the_groups():
    layer = grouped()
    layer.S.data.copy_(torch.tensor([[1.0, 3.0, 0.1], [2.0, 0.5, 0.1]]))
    assert direction_energies(layer).tolist() == pytest.approx([5.0, 9.25, 0.02])
    truncate_(layer, 2)
    assert layer.S.tolist() == [[3.0, 1.0], [0.5, 2.0]]
    assert layer.U.shape == (2, 12, 2)


@pytest.mark.parametrize(
    ("kind", "moments"), [("adamw", ["exp_avg", "exp_avg_sq"]), ("sgd", ["momentum_buffer"])]
)
def test_truncation_selects_the_optimizer_state_of_the_kept_directions(kind, moments):
    model = nn.Sequential(linear(6, 5, 4), nn.Linear(6, 2).double())
    optimizer = optimizer_with_state(model, kind)
    layer = model[0]
    Manifold(model).retract_(polar, optimizer)
    Manifold(model).retract_(polar, optimizer)
    keep = layer.S.argsort(descending=True)[:2]
    old = {n: dict(optimizer.state[p]) for n, p in layer.named_parameters()}
    untouched = optimizer.state[model[1].weight][moments[0]].clone()
    truncate_(layer, 2, optimizer)
    for name in "USV":
        state = optimizer.state[getattr(layer, name)]
        for moment in moments:
            torch.testing.assert_close(state[moment], old[name][moment][..., keep])
    torch.testing.assert_close(optimizer.state[model[1].weight][moments[0]], untouched)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = layer.S.detach().clone()
    optimizer.step()
    assert not torch.equal(before, layer.S)


@given(shapes, shapes, groups, seeds)
def test_rediagonalising_keeps_the_matrix_and_transports_gradients_of_u_and_v(l, r, lead, seed):  # noqa: E741
    rank = min(l[1], r[1])
    U, V = noise(*lead, l[0], rank, seed=seed), noise(*lead, r[0], rank, seed=seed + 1)
    S = noise(*lead, rank, seed=seed + 2).abs() + 0.1
    new, (T_U, _, T_V) = rediagonalise(Factors(U, S, V))
    torch.testing.assert_close(new.matrix(), Factors(U, S, V).matrix(), atol=1e-9, rtol=1e-9)
    assert departure(new.U).max() < 1e-12
    assert departure(new.V).max() < 1e-12
    assert bool((new.S.diff(dim=-1) <= 1e-12).all())

    G = noise(*lead, l[0], r[0], seed=seed + 3)  # dL/dW of some loss
    G_U, G_V = G @ (V * S.unsqueeze(-2)), G.mT @ (U * S.unsqueeze(-2))
    torch.testing.assert_close(G_U @ T_U, G @ (new.V * new.S.unsqueeze(-2)), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(
        G_V @ T_V, G.mT @ (new.U * new.S.unsqueeze(-2)), atol=1e-8, rtol=1e-8
    )


def test_truncating_a_layer_that_is_zero_drops_nothing():
    layer = linear(6, 5, 3)
    layer.S.data.zero_()
    assert truncate_(layer, 2) == 0
    assert layer.rank == 2


def test_truncating_to_more_than_the_rank_is_refused():
    with pytest.raises(ValueError, match="not between 1 and the layer's rank 3"):
        truncate_(linear(5, 5, 3), 4)
