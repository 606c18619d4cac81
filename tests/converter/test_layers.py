"""Which layers are factored, why others are not, and that the user's own model is left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from converter.convert import convert, plan
from converter.errors import StiefelError
from converter.factors import FactoredConv1d, FactoredLinear, factored_layers
from converter.layers import closed, find_layers, install, prepared

close = torch.testing.assert_close


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


class OddLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class NamedLinear(nn.Linear):
    """A subclass that computes what its base does."""


def parametrized(kind: str) -> nn.Module:
    layer = nn.Linear(8, 8)
    if kind == "weight norm":
        return parametrizations.weight_norm(layer)
    if kind == "spectral norm":
        return parametrizations.spectral_norm(layer)
    if kind == "orthogonal":
        return parametrizations.orthogonal(layer)
    parametrize.register_parametrization(layer, "weight", Doubled())
    if kind == "two":
        parametrize.register_parametrization(layer, "weight", Doubled())
        parametrize.register_parametrization(layer, "bias", Doubled())
    return layer


def snapshot(model: nn.Module):
    """All that could change in a model: its tensors, their identity, classes, hooks, modes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (id(t), t.detach().clone(), t.requires_grad) for name, t in tensors.items()},
        {
            name: (id(m), type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        },
    )


def assert_same(before, after):
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    for name, (identity, value, grad) in before[0].items():
        assert (identity, grad) == (after[0][name][0], after[0][name][2]), name
        assert torch.equal(value, after[0][name][1]), name


def untouched_models():
    yield "plain", nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8).eval())
    for kind in ("one", "two", "weight norm", "spectral norm", "orthogonal"):
        yield kind, nn.Sequential(parametrized(kind), nn.Linear(8, 8))
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    yield "attention", nn.Sequential(encoder, nn.Linear(8, 8))
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    yield "tied", tied
    frozen = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    frozen[0].weight.requires_grad_(False)
    yield "frozen", frozen


@pytest.mark.parametrize(("name", "model"), list(untouched_models()))
def test_planning_and_converting_leave_the_original_alone(name, model):
    x = torch.randn(16, 8) if name != "attention" else torch.randn(16, 4, 8)
    model.train()
    model[-1].eval()
    before = snapshot(model)
    for calibration in (None, x):
        small = convert(model, plan(model, 2, calibration=calibration), calibration=calibration)
        assert factored_layers(small)
        assert_same(before, snapshot(model))
        assert not {id(p) for p in small.parameters()} & {id(p) for p in model.parameters()}
        for parameter in small.parameters():
            parameter.data.zero_()
        assert_same(before, snapshot(model))
    if name not in ("plain", "attention", "tied", "frozen"):
        assert parametrize.is_parametrized(model[0])


@pytest.mark.parametrize("kind", ["one", "two", "weight norm", "spectral norm", "orthogonal"])
def test_parametrizations_are_folded_into_what_is_factored(kind):
    model, x = nn.Sequential(parametrized(kind)).eval(), torch.randn(3, 8)
    small = convert(model, plan(model, 8, layers={"0": {"rank": 8}}))
    assert isinstance(small[0], FactoredLinear)
    close(small(x), model(x))
    kept = convert(model, plan(model, 2, layers={"0": "keep"}))
    close(kept(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "recompute",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ],
)
def test_weights_recomputed_by_hooks_stay_dense_and_say_so(recompute):
    model, x = nn.Sequential(recompute(nn.Linear(8, 8)), nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    model(x)
    before = model(x)
    made = plan(model, 2)
    assert "recomputed at every step" in made["0"].reason
    small = convert(model, made)
    close(small[0](x), model[0](x))
    assert list(factored_layers(small)) == ["1"]
    close(model(x), before)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_with_hooks_stays_dense_and_keeps_them(register):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    getattr(model[0], register)(lambda m, *given: given[-1][0] * 0.5)
    made = plan(model, 8, layers={"1": {"rank": 8}})
    assert "forward hooks" in made["0"].reason
    close(convert(model, made)(x), model(x))


def reasons() -> dict[str, tuple[nn.Module, str]]:
    return {
        "depthwise": (nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
        "transposed": (nn.ConvTranspose2d(8, 8, 3), "ConvTranspose2d layers are not factored"),
        "three axes": (nn.Conv3d(8, 8, 3), "Conv3d layers are not factored"),
        "embedding": (nn.Embedding(9, 8), "Embedding layers"),
        "recurrent": (nn.LSTM(8, 8), "RNNBase|LSTM"),
        "odd class": (OddLinear(8, 8), "class OddLinear changes what the layer computes"),
        "own widths": (nn.MultiheadAttention(8, 2, kdim=4), "width of their own"),
        "bias_kv": (nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv"),
    }


@pytest.mark.parametrize("case", reasons())
def test_what_cannot_be_factored_stays_dense_and_says_why(case):
    layer, words = reasons()[case]
    model = nn.ModuleDict({"odd": layer, "fine": nn.Linear(16, 16)})
    made = plan(model, 2)
    assert [entry.name for entry in made.factored] == ["fine"]
    with pytest.raises(StiefelError, match=words):
        plan(model, 2, layers={"odd": {"rank": 2}})
    with pytest.raises(StiefelError, match=rf"odd cannot be factored: .*({words})"):
        made.with_rank("odd", 2)
    small = convert(model, made)
    assert type(small["odd"]) is type(layer)
    assert small.state_dict().keys() > {f"odd.{key}" for key in layer.state_dict()}
    assert isinstance(small["fine"], FactoredLinear)


def test_a_subclass_that_computes_the_same_is_factored():
    model = nn.Sequential(NamedLinear(8, 8))
    assert plan(model, 2)["0"].rank == 2


def test_a_single_layer_is_a_model_too():
    layer, x = nn.Conv1d(6, 8, 3), torch.randn(2, 6, 9)
    small = convert(layer, plan(layer, 1.0, layers={"": {"rank": 1.0}}))
    assert isinstance(small, FactoredConv1d)
    close(small(x), layer(x))


def test_tied_weights_are_factored_once_and_still_tied():
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 12))
    model[2].weight = model[0].weight
    made = plan(model, 3)
    assert made["2"].tied_to == "0"
    small, x = convert(model, made), torch.randn(3, 12)
    for name in "USV":
        assert getattr(small[2], name) is getattr(small[0], name)
    assert small[2].bias is not small[0].bias
    assert small[3].U is not small[0].U
    assert sum(p.numel() for p in small.parameters()) == made.factored_parameters
    full = convert(model, made.with_rank("2", 12))
    assert (made.with_rank("2", 5)["0"].rank, full[0].rank) == (5, 12)
    close(full[:3](x), model[:3](x))
    lower = convert(small, plan(small, 2))
    assert lower[2].U is lower[0].U
    assert lower[0].rank == 2


def test_a_module_used_twice_is_replaced_in_both_places():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    small = convert(model, plan(model, 2))
    assert isinstance(small["a"], FactoredLinear)
    assert small["a"] is small["b"][0]


@pytest.mark.parametrize("stranger", [nn.Embedding(8, 8), OddLinear(8, 8)])
@pytest.mark.parametrize("first", [True, False])
def test_a_weight_shared_with_what_cannot_be_factored_stays(stranger, first):
    layer = nn.Linear(8, 8)
    layer.weight = stranger.weight
    model = nn.Sequential(*((stranger, layer) if first else (layer, stranger)), nn.Linear(8, 8))
    made = plan(model, 2)
    assert [entry.rank for entry in made.layers] == [None, None, 2]
    assert "shared with a" in made["1" if first else "0"].reason
    small = convert(model, made)
    assert small[0].weight is small[1].weight


def test_the_first_convolution_is_factored_only_by_its_own_name():
    model = nn.Sequential(nn.Conv2d(3, 16, 7), nn.Conv2d(16, 16, 3))
    assert "first convolution: 3 input channels" in plan(model, 4)["0"].reason
    assert plan(model, 4, layers={"*": {"rank": 2}})["0"].rank is None
    assert plan(model, 4, layers={"0": {"rank": 2}})["0"].rank == 2


def test_layers_without_values_are_refused():
    for model in (nn.LazyLinear(4), nn.Linear(4, 4, device="meta")):
        with pytest.raises(StiefelError, match="weight holds no values yet"):
            plan(nn.Sequential(model), 2)


def test_opening_and_closing_changes_nothing():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    back = closed(prepared(model))
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert all(
        torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True)
    )


def test_install_puts_a_module_wherever_the_old_one_is_registered():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(old, nn.Sequential(old))
    install(model, {"0": new})
    assert model[0] is new
    assert model[1][0] is new
    assert install(old, {"": new}) is new


def test_every_layer_is_found_once_with_its_costs():
    model = nn.Sequential(nn.Conv2d(4, 8, (3, 5), groups=2), nn.Linear(8, 6, bias=False))
    first, second = find_layers(copy.deepcopy(model))
    assert (first.kind, first.groups, first.weight_shape) == ("Conv2d", 2, (8, 2, 3, 5))
    assert first.shape("spatial") == (4 * 5, 2 * 3)
    assert first.shape("channel") == (4, 2 * 15)
    assert (first.parameters, first.bias_parameters) == (8 * 30 + 8, 8)
    assert first.worthwhile_rank("spatial") == (240 - 1) // (2 * 27)
    assert second.schemes == (None,)
    assert second.worthwhile_rank(None) == 47 // 15
