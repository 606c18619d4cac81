"""Calibration: optima against float64 references, and what it must never do."""

import copy

import pytest
import torch
from torch import nn

from converter import calibration as calibrating
from converter import sampling
from converter.calibration import Calibration, channel_moments, channel_sums
from converter.convert import convert, plan
from converter.decompose import square_root
from converter.errors import StiefelError
from converter.factors import Factored, factored_layers
from converter.layers import find_layers, prepared
from converter.moments import second_moments
from converter.rank_plan import RankPlan
from converter.reconstruction import reconstruct
from tests.converter.calibrated import CPU, NETS, OFF, QUICK, Moody, residual_net, settled, shrunk

ALL = 10_000  # more positions than there are


def outputs_of(model: nn.Module, name: str, images: torch.Tensor) -> torch.Tensor:
    kept = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, o: kept.append(o))
    with torch.no_grad():
        model(images)
    handle.remove()
    return kept[0]


def test_second_moments_are_those_of_all_columns_in_float64(images):
    net = residual_net().eval()
    layers = find_layers(net)
    found = second_moments(net, images, layers, Calibration(positions=ALL), CPU)
    x = outputs_of(net, "0", images).double()
    patches = torch.nn.functional.unfold(x, 3, padding=1).mT.reshape(-1, 54)
    torch.testing.assert_close(
        found["1.a", "channel"].matrix, patches.mT @ patches / len(patches), rtol=1e-5, atol=1e-6
    )
    assert found["1.a", "spatial"].matrix.shape == (18, 18)


def test_whitened_truncation_is_the_best_of_its_rank_on_the_images():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 9, bias=False)).double()
    x = torch.randn(60, 3, 2, 2, dtype=torch.float64) * torch.linspace(0.1, 3, 2)
    settings = OFF.model_copy(update={"whitened": True})
    made = plan(net, 3, calibration=x, settings=settings)
    small = convert(net, made, calibration=x, settings=settings)
    rows, W = x.flatten(1), net[1].weight.detach()
    reference = torch.linalg.svdvals(W @ square_root(rows.mT @ rows / 60))[3:].square().sum()
    error = (net(x) - small(x)).square().sum(1).mean()
    torch.testing.assert_close(error.detach(), reference)
    whole = net(x).detach().square().sum(1).mean()
    assert made["1"].expected_error == pytest.approx(float((reference / whole).sqrt()))


def test_calibration_runs_few_images_at_once(images, monkeypatch):
    monkeypatch.setattr(calibrating, "BATCH", 16)
    net, seen = residual_net().eval(), []
    net[1].register_forward_pre_hook(lambda m, i: seen.append(len(i[0])))
    layers = find_layers(net)
    whole = second_moments(net, images, layers, Calibration(positions=ALL), CPU)
    assert max(seen) == 16
    monkeypatch.setattr(calibrating, "BATCH", 64)
    for key, moment in second_moments(net, images, layers, Calibration(positions=ALL), CPU).items():
        torch.testing.assert_close(whole[key].matrix, moment.matrix, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["linear only", "no batch norm"])
def test_sequential_reconstruction_never_raises_a_layers_error(name, images):
    """The regression, cut in its inputs' norm, beats any other weight of that rank."""
    net = settled(NETS[name]())
    settings = OFF.model_copy(
        update={"sequential": True, "positions": ALL, "ridge": 1e-9, "residual": 0.0}
    )
    images = images.repeat(8, 1, 1, 1)  # rows enough to ask more of them than of the weight
    images = images + 0.5 * torch.randn_like(images)
    small = shrunk(net, images, settings, scheme="channel")
    for layer_name, layer in factored_layers(small).items():
        inputs = []
        hook = layer.register_forward_pre_hook(lambda m, i, kept=inputs: kept.append(i[0]))
        given = outputs_of(small, layer_name, images)
        hook.remove()
        wanted = outputs_of(net, layer_name, images)
        dense = net.get_submodule(layer_name)
        whole = dense.weight.detach().flatten(1).double()
        at = sampling.positions("", len(images), sampling.places(dense, wanted, len(images)), ALL)
        size = () if sampling.is_linear(dense) else tuple(wanted.shape[2:])
        rows = sampling.input_rows(dense, inputs[0], size, at).double()
        left = torch.linalg.svd(whole @ square_root(rows.mT @ rows)).U[:, : layer.rank]
        other = rows @ (left @ left.mT @ whole).mT + dense.bias
        target = sampling.output_rows(dense, wanted, at)
        mine = (sampling.output_rows(dense, given, at) - target).square().mean()
        assert mine <= (other - target).square().mean() * (1 + 1e-3)


def test_batch_norm_matching_gives_the_dense_networks_moments(images):
    net = settled(residual_net())
    small = shrunk(net, images, OFF.model_copy(update={"match_batch_norm": True}))
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            mine, theirs = (
                channel_moments(channel_sums(outputs_of(model, name, images)))
                for model in (small, net)
            )
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_the_end_of_a_branch_makes_up_for_its_shortcut(images):
    net = settled(residual_net(norm=False))
    off = Calibration(positions=ALL, refine_steps=0, residual=0.0)
    error = {}
    for residual in (0.0, 1.0):
        settings = off.model_copy(update={"residual": residual})
        made = plan(net, 0.3, calibration=images, settings=settings).with_rank("1.a", 2)
        made = made.with_rank("2.b", None)
        small = convert(net, made, calibration=images, settings=settings)
        error[residual] = (
            (outputs_of(small, "2", images) - outputs_of(net, "2", images)).square().mean()
        )
    assert error[1.0] < 0.95 * error[0.0]


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_network_calibrates_and_stays_finite(name, images):
    net = settled(NETS[name]())
    before = copy.deepcopy(net.state_dict())
    small = shrunk(net, images, QUICK)
    assert factored_layers(small)
    assert small(images).isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


def test_at_full_rank_calibration_changes_next_to_nothing(images):
    net = settled(residual_net())
    made = plan(net, 0.5)
    for name in ("1.a", "1.b", "2.a", "2.b"):
        made = made.with_rank(name, made[name].full_rank)
    made = made.with_rank("0", None).with_rank("5", None)
    settings = Calibration(refine_steps=0, positions=ALL)
    small = convert(net, made, calibration=images, settings=settings)
    torch.testing.assert_close(small(images), net(images), rtol=1e-3, atol=1e-3)


def test_with_everything_off_images_change_nothing(images):
    net = settled(residual_net())
    plain = convert(net, plan(net, 0.3))
    made = plan(net, 0.3, calibration=images, settings=OFF)
    for key, value in shrunk(net, images, OFF).state_dict().items():
        assert torch.equal(value, plain.state_dict()[key])
    assert [p.rank for p in made.layers] == [p.rank for p in plan(net, 0.3).layers]


def test_a_plan_from_memory_gives_the_network_that_its_json_gives(images):
    net = settled(residual_net())
    made = plan(net, 0.3)  # its decompositions know nothing of the images
    settings = OFF.model_copy(update={"whitened": True})
    here, read = (
        convert(net, one, calibration=images, settings=settings)
        for one in (made, RankPlan.from_json(made.to_json()))
    )
    assert all(torch.equal(v, read.state_dict()[k]) for k, v in here.state_dict().items())


@pytest.mark.parametrize(
    "switch",
    [{"whitened": True}, {"sequential": True}, {"match_batch_norm": True}, {"refine_steps": 2}],
    ids=lambda s: next(iter(s)),
)
def test_each_switch_does_something_alone(switch, images):
    net = settled(residual_net())
    plain, with_it = (shrunk(net, images, OFF.model_copy(update=update)) for update in ({}, switch))
    assert not torch.equal(plain(images), with_it(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_is_kept_while_calibration_computes_in_float32_or_more(dtype, images):
    net = settled(residual_net())
    wide = shrunk(net, images, QUICK)
    narrow = shrunk(copy.deepcopy(net).to(dtype), images, QUICK)
    assert {t.dtype for t in narrow.state_dict().values() if t.is_floating_point()} == {dtype}
    gap = (narrow.float()(images) - wide(images)).norm() / wide(images).norm()
    assert gap < {torch.float16: 0.02, torch.bfloat16: 0.2, torch.float64: 0.02}[dtype]


@pytest.mark.parametrize("stage", ["calibrate", "1.a", "refine"])
def test_an_interruption_leaves_the_dense_model_as_it_was(stage, images):
    net = settled(residual_net())
    before = copy.deepcopy(net.state_dict())
    made = plan(net, 0.3).without_spectra()

    def stop(what: str, done: int, total: int) -> None:
        if what == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(net, made, calibration=images, settings=QUICK, progress=stop)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_the_same_images_give_the_same_network(images):
    net = settled(residual_net())
    first, second = (shrunk(net, images, QUICK) for _ in range(2))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_bad_images_are_refused(images):
    net = residual_net()
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(StiefelError, match="not finite"):
        plan(net, 0.5, calibration=images)
    with pytest.raises(StiefelError, match="needs a batch of images"):
        plan(net, 0.5, calibration=images[:0], example=images[:1])


def test_tied_and_factored_layers_are_passed_over(images):
    net = residual_net(norm=False).eval()
    net[2].a.weight = net[1].a.weight
    small = shrunk(net, images, QUICK)
    assert small[2].a.U is small[1].a.U
    smaller = shrunk(small, images, QUICK)
    assert all(
        layer.rank <= factored_layers(small)[name].rank
        for name, layer in factored_layers(smaller).items()
    )
    assert isinstance(smaller[1].a, Factored)


def test_reconstruction_alone_needs_no_refinement(images):
    net = settled(residual_net())
    made = plan(net, 0.3, calibration=images)
    small = convert(net, made)
    gap = (small(images) - net(images)).square().mean()
    reconstruct(prepared(net), small, made, images, Calibration())
    assert (small(images) - net(images)).square().mean() < gap


@pytest.mark.parametrize("rank", [2, "params=0.5"])
def test_a_model_whose_output_is_not_finite_is_refused_by_its_weight(rank):
    model, images = Moody(), torch.randn(16, 3, 2, 2)
    made = plan(model, 2)
    model.b.bias.data[1] = float("nan")
    for broken in (
        lambda: plan(model, rank, calibration=images),
        lambda: convert(model, made, calibration=images),
    ):
        with pytest.raises(StiefelError, match=r"output .* not finite; b.bias holds NaN"):
            broken()
