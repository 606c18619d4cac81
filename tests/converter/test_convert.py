"""Conversion keeps the model what it was, but for the rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from converter.convert import convert, plan
from converter.decompose import Factors, decompose
from converter.errors import StiefelError
from converter.factors import Factored, factored_layers
from converter.inspect import inspect, spectra
from converter.models import load

close = torch.testing.assert_close
EVERYTHING = {"*": {"rank": 1.0}}


class Net(nn.Module):
    """Buffers, submodules in two modes, an unused layer, an attribute, a method of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(6, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.mix = nn.Conv2d(12, 12, (3, 1), padding=(1, 0), groups=2, bias=False)
        self.head, self.idle = nn.Linear(12, 9), nn.Linear(40, 40)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.note = {"made": "by hand"}
        self.to(dtype)

    def features(self, x):
        return self.mix(self.stem(x)).mean((2, 3))

    def forward(self, x):
        return self.scale * self.head(self.features(x))


@pytest.mark.parametrize("scheme", ["spatial", "channel", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_full_rank_it_equals_the_dense_model_to_rounding(scheme, dtype):
    model, x = Net(dtype).eval(), torch.randn(2, 6, 8, 8, dtype=dtype)
    model(x)
    small = convert(model, plan(model, 1.0, scheme=scheme, layers=EVERYTHING))
    assert len(factored_layers(small)) == 4
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    close(small(x), model(x), atol=tolerance, rtol=tolerance)


def test_a_whole_network_is_exact_at_full_rank():
    model = load("zoo:digits")
    shape = model.stiefel_spec.input.shape
    x = torch.randn(2, *shape)
    names = [e.name for e in plan(model, 1).layers if "depthwise" not in (e.reason or "")]
    everything = {layer: {"rank": 1.0} for layer in names}
    small = convert(model, plan(model, 1.0, layers=everything))
    assert len(factored_layers(small)) == len(names)
    close(small(x), model(x), atol=1e-4, rtol=1e-4)


def test_class_methods_modes_buffers_and_attributes_are_kept():
    model = Net().train()
    model.head.eval()
    model.mix.weight.requires_grad_(False)
    small = convert(model, plan(model, 3))
    assert type(small) is Net
    assert small.note == model.note
    assert small.note is not model.note
    assert [n for n, _ in small.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert small.state_dict().keys() >= {"scale", "stem.1.running_mean", "head.bias"}
    assert "scratch" not in small.state_dict()
    assert [small.stem.training, small.stem[0].training, small.head.training] == [True, True, False]
    assert not small.mix.U.requires_grad
    assert small.head.U.requires_grad
    close(small.features(torch.randn(2, 6, 8, 8)).shape, torch.Size([2, 12]))
    assert small.stiefel_plan == plan(model, 3).without_spectra()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_model_is_kept(dtype):
    model = Net(dtype).eval()
    small = convert(model, plan(model, 1.0, layers=EVERYTHING))
    assert {p.dtype for p in small.parameters()} == {dtype}
    x = torch.randn(2, 6, 8, 8, dtype=dtype)
    close(small(x), model(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("calibrated", [False, True])
def test_an_example_is_taken_in_the_models_own_dtype(dtype, calibrated):
    model, x = Net(dtype).eval(), torch.randn(4, 6, 8, 8)
    made = plan(model, 4, example=x, calibration=x if calibrated else None)
    assert made.dense_macs == plan(Net(), 4, example=x).dense_macs


@given(st.integers(1, 6), st.sampled_from(["spatial", "channel"]))
def test_converted_weights_are_the_best_of_their_rank(rank, scheme):
    model = Net(torch.float64)
    made = plan(model, rank, scheme=scheme, layers={"*": {"rank": rank}})
    small = convert(model, made)
    for name, layer in factored_layers(small).items():
        weight = model.get_submodule(name).weight
        wrong = (layer.weight.dense() - weight).norm() / weight.norm()
        assert layer.rank == rank
        assert made[name].expected_error == pytest.approx(wrong.item(), abs=1e-6)


@pytest.mark.parametrize("policy", [4, "0.5", "energy=0.8", "params=0.6", "macs=0.684"])
def test_a_factored_model_is_lowered_from_its_factors_alone(policy, monkeypatch):
    model, x = Net(torch.float64).eval(), torch.randn(2, 6, 8, 8).double()
    first = convert(model, plan(model, 5, layers={"*": {"rank": 5}}))
    for layer in factored_layers(first).values():  # as training leaves them: not quite orthonormal
        layer.U.data += 0.01 * torch.randn_like(layer.U)
    monkeypatch.setattr(Factors, "matrix", lambda self: pytest.fail("W was formed"))
    monkeypatch.setattr(Factored, "unflatten_matrix", lambda *a: pytest.fail("W was formed"))
    made = plan(first, policy, example=x)
    lower = convert(first, made)
    monkeypatch.undo()
    assert made.factored
    assert made.factored_parameters < made.dense_parameters
    for entry in made.factored:
        assert entry.kind.startswith("factored ")
        assert entry.rank < entry.current_rank == 5
        old, new = (m.get_submodule(entry.name) for m in (first, lower))
        best = decompose(old.factors().matrix().detach(), entry.rank).matrix()
        close(new.factors().matrix(), best, atol=1e-8, rtol=1e-8)
    assert lower(x).shape == model(x).shape
    with pytest.raises(StiefelError, match="rank 6 is not possible; choose 1 to 5"):
        made.with_rank("head", 6)


def test_a_plan_is_refused_by_another_model():
    made = plan(nn.ModuleDict({"head": nn.Linear(9, 9)}), 2)
    for other, words in [
        ({"heed": nn.Linear(9, 9)}, "'head' is not in the model; did you mean heed"),
        ({"head": nn.Linear(9, 8)}, r"weight \(9, 9\), the model's has \(8, 9\)"),
        ({"head": nn.Embedding(9, 9)}, "head cannot be factored: Embedding"),
        ({"head": nn.Conv2d(9, 9, 1)}, r"the model's has \(9, 9, 1, 1\)"),
    ]:
        with pytest.raises(StiefelError, match=words):
            convert(nn.ModuleDict(other), made)


def test_a_plan_made_before_the_weights_changed_still_gives_the_best_factors():
    model = nn.Sequential(nn.Linear(9, 9))
    made = plan(model, 3)
    nn.init.normal_(model[0].weight)
    found = convert(model, made)[0].weight.dense()
    close(found, decompose(model[0].weight.detach(), 3).matrix(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", [2, "params=0.5"])
def test_a_broken_weight_is_named(policy):
    model = nn.ModuleDict({"fine": nn.Linear(9, 9), "broken": nn.Linear(9, 9)})
    model["broken"].weight.data[3, 3] = float("nan")
    with pytest.raises(StiefelError, match="broken: a weight holds NaN"):
        plan(model, policy)


def test_converting_twice_gives_the_very_same_numbers():
    model = Net()
    one, other = (convert(model, plan(model, "params=0.7")) for _ in range(2))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_progress_names_every_layer_in_turn():
    model, seen = Net(), []
    made = plan(model, 3, progress=lambda *told: seen.append(told))
    assert seen[-1] == ("plan", 4, 4)
    seen.clear()
    convert(model, made, progress=lambda *told: seen.append(told))
    assert [what for what, _, _ in seen] == [*(e.name for e in made.factored), "converted"]
    assert seen[-1][1] == seen[-1][2]


def test_inspection_tells_a_dense_model_from_its_converted_one():
    model, x = Net().eval(), torch.randn(2, 6, 8, 8)
    before = inspect(model, x)
    assert [row.kind for row in before.layers] == ["Conv2d", "Conv2d", "Linear", "Linear"]
    assert [row.rank for row in before.layers] == [None] * 4
    assert {row.reason for row in before.layers} == {"not converted"}
    assert before.parameters == sum(p.numel() for p in model.parameters())
    made = plan(model, 3, example=x, layers={"head": "keep"})
    after = inspect(convert(model, made), x)
    rows = {row.name: row for row in after.layers}
    assert (after.parameters, after.macs) == (made.factored_parameters, made.factored_macs)
    for entry in made.layers:
        row = rows[entry.name]
        assert (row.rank, row.full_rank) == (entry.rank, entry.full_rank)
        assert (row.parameters, row.macs or 0) == (entry.factored_parameters, entry.factored_macs)
        assert row.error == (entry.expected_error if entry.rank else None)
        assert row.shape == entry.shape
    assert rows["head"].reason == "kept by request"
    assert rows["idle"].macs is None, "a layer that is never used costs nothing to run"
    assert sum(row.macs or 0 for row in after.layers) == after.macs


def test_inspection_counts_attentions_projections_dense_or_not():
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(3, 5, 8)
    found = {row.name: row for row in inspect(model, x).layers}
    assert found["self_attn.in_proj"].macs == 5 * 8 * 24
    assert found["self_attn.out_proj"].macs == 5 * 8 * 8
    assert "self_attn" not in found


def test_spectra_are_the_singular_values_and_of_a_factored_layer_its_own():
    model = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.Linear(9, 7), nn.Embedding(3, 3))
    found = spectra(model)
    assert found.keys() == {"0", "1"}
    close(torch.tensor(found["1"]), torch.linalg.svdvals(model[1].weight.detach()))
    groups = model[0].weight.detach().movedim(-1, 1).reshape(2, 12, 9)
    close(torch.tensor(found["0"]), torch.linalg.svdvals(groups).mean(0))
    small = convert(model, plan(model, 2))
    close(torch.tensor(spectra(small)["1"]), torch.tensor(found["1"][:2]), atol=1e-5, rtol=1e-5)


def test_a_policy_is_no_plan():
    model = nn.Linear(8, 8)
    with pytest.raises(StiefelError, match=r"takes a plan, not '0.5': give plan\(model, '0.5'\)"):
        convert(model, "0.5")
