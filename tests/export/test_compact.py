"""The compact form computes what the factored model does, with plain layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from converter.attention import FactoredAttention
from converter.convert import convert, plan
from converter.factors import Factored
from export.compact import compact, compaction

ROUNDING = 1e-13  # of float64, through a few layers


class Functional(nn.Module):
    """Reads its layers' weights instead of calling them, as Swin's attention does."""

    def __init__(self):
        super().__init__()
        self.packed, self.tied = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x):
        q, k, v = F.linear(x, self.packed.weight, self.packed.bias).chunk(3, dim=-1)
        return self.tied(q * k) + F.linear(v, self.tied.weight, self.tied.bias)


class Attending(nn.Module):
    """Self-attention and cross-attention, packed projections sliced in the latter."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        h, _ = self.attention(x, x, x, need_weights=False)
        return self.attention(h, x, x.flip(1), need_weights=False)[0]


class Branching(nn.Module):
    """Control flow on values: torch.fx can't trace it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24))

    def forward(self, x):
        return self.layers(x) if x.sum() > 0 else self.layers(-x)


class Auxiliary(nn.Module):
    """A head that only training uses, as GoogLeNet's."""

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(24, 24), nn.Linear(24, 9), nn.Linear(24, 3)

    def forward(self, x):
        h = F.relu(self.body(x))
        return (self.head(h), self.aux(h)) if self.training else self.head(h)


def shared_layer() -> nn.Module:
    layer = nn.Linear(24, 24)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), layer)


def tied_weights() -> nn.Module:
    first, second = nn.Linear(24, 24), nn.Linear(24, 24)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(shared_layer, (24,)), (tied_weights, (24,)), (Functional, (24,)), (Attending, (5, 32))],
)
def test_the_fold_changes_outputs_by_rounding_only(make, shape, factor, distance):
    model = factor(make()).double()
    before = copy.deepcopy(model.state_dict())
    small = compact(model)
    for _ in range(3):
        assert distance(model, small, torch.randn(4, *shape)) < ROUNDING
    assert not any(isinstance(module, Factored) for module in small.modules())
    assert not small.training
    assert not any(parameter.requires_grad for parameter in small.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@st.composite
def convolutions(draw):
    """A convolution with any geometry, its batch norm, and how to factor it."""
    dims, groups = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    kernel = draw(st.tuples(*[st.integers(1, 4)] * dims))
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    kind = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
    layer = kind(
        8 * groups,
        6 * groups,
        kernel,
        stride=draw(st.tuples(*[st.integers(1, 2)] * dims)),
        padding=draw(st.tuples(*[st.integers(0, 2)] * dims)),
        dilation=draw(st.tuples(*[st.integers(1, 2)] * dims)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[dims]
    norm = norm(6 * groups, affine=draw(st.booleans()), eps=draw(st.sampled_from([1e-5, 1e-1])))
    return nn.Sequential(layer, norm), draw(st.sampled_from(["spatial", "channel"]))


@given(convolutions(), st.integers(1, 2))
def test_any_convolution_folds_with_its_batch_norm(factor, distance, drawn, rank):
    net, scheme = drawn
    layer = net[0]
    model = factor(net, 1, scheme=scheme, layers={"0": {"rank": rank}}).double()
    done = compaction(model)
    x = torch.randn(2, layer.in_channels, *(9, 8)[: len(layer.kernel_size)])
    assert distance(model, done.model, x) < ROUNDING
    assert done.folded == ("1",)
    assert isinstance(done.model[1], nn.Identity)
    assert done.model[0](x.double()).shape == layer.double()(x.double()).shape


def test_w_is_never_multiplied_out_where_its_rank_pays(factor):
    model = factor(nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Conv1d(1, 1, 1)), 3)
    done = compaction(model)
    assert done.ranks == {"0": 3}
    assert [tuple(half.weight.shape) for half in done.model[0]] == [(3, 40), (50, 3)]
    assert done.merged == ()
    # S lies in equal parts in both factors.
    first, second = done.model[0]
    assert torch.allclose(first.weight.norm(dim=1), second.weight.norm(dim=0), atol=1e-5)


def test_a_rank_that_no_longer_pays_is_merged_back_and_reported(factor, distance):
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model = factor(net, 2, layers={"0": {"rank": 24}}).double()
    done = compaction(model)
    assert done.merged == ("0",)
    assert done.ranks == {"3": 2}
    assert type(done.model[0]) is nn.Conv2d
    assert done.model[0].weight.shape == (8, 8, 3, 3)
    assert done.folded == ("1",)
    assert distance(model, done.model, torch.randn(2, 8, 9, 9)) < ROUNDING


def test_a_strided_layer_stays_factored_where_only_arithmetic_is_saved(factor):
    """The spatial scheme's first half runs before the second one's stride."""
    layer = nn.Conv2d(8, 8, 3, stride=2)
    per_rank = 2 * 8 * 3
    for rank, pays in ((layer.weight.numel() // per_rank - 1, True), (24, False)):
        model = factor(nn.Sequential(copy.deepcopy(layer)), 1, layers={"0": {"rank": rank}})
        assert bool(compaction(model).ranks) is pays


class Around(nn.Module):
    """A layer, a batch norm, and some way of using them that `forward` decides."""

    def __init__(self, forward, layer=None, norm=None):
        super().__init__()
        self.layer = layer or nn.Linear(24, 24)
        self.norm = norm or nn.BatchNorm1d(24)
        self.other = nn.BatchNorm1d(24)
        self.compute = forward

    def forward(self, x):
        return self.compute(self, x)


class NoisyNorm(nn.BatchNorm1d):
    """More than batch norm."""

    def forward(self, x):
        return super().forward(x).relu()


def _output_used_twice(m, x):
    h = m.layer(x)
    return m.norm(h) + h


UNFOLDED = {
    "output used twice": Around(_output_used_twice),
    "activation between": Around(lambda m, x: m.norm(F.relu(m.layer(x)))),
    "layer used twice": Around(lambda m, x: m.norm(m.layer(m.layer(x)))),
    "norm used twice": Around(lambda m, x: m.norm(m.norm(m.layer(x)))),
    "two norms": Around(lambda m, x: m.norm(m.layer(x)) + m.other(m.layer(x))),
    "weight read elsewhere": Around(lambda m, x: m.norm(m.layer(x)) + F.linear(x, m.layer.weight)),
    "norm's scale read elsewhere": Around(lambda m, x: m.norm(m.layer(x)) * m.norm.weight),
    "no statistics": Around(
        lambda m, x: m.norm(m.layer(x)), norm=nn.BatchNorm1d(24, track_running_stats=False)
    ),
    "a subclass": Around(lambda m, x: m.norm(m.layer(x)), norm=NoisyNorm(24)),
    "untraceable": Branching(),
}


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "factored"])
@pytest.mark.parametrize("case", UNFOLDED)
def test_batch_norm_stays_where_folding_would_change_the_result(
    case, dense, factor, stir, distance
):
    model = copy.deepcopy(UNFOLDED[case])
    model = (stir(model) if dense else factor(model)).double()
    done = compaction(model)
    assert done.folded == ()
    assert distance(model, done.model, torch.randn(16, 24)) < ROUNDING


def test_a_folded_norm_leaves_other_users_of_a_tied_weight_alone(factor, distance):
    first, second = nn.Linear(24, 24), nn.Linear(24, 24)
    second.weight = first.weight
    model = factor(nn.Sequential(first, nn.BatchNorm1d(24), nn.ReLU(), second)).double()
    done = compaction(model)
    assert done.folded == ("1",)
    assert distance(model, done.model, torch.randn(8, 24)) < ROUNDING


@pytest.mark.parametrize("make", [shared_layer, tied_weights])
def test_shared_weights_stay_shared(make, factor):
    model = factor(make())
    small = compact(model)
    assert len({id(p) for p in small.parameters()}) == len(list(small.parameters()))
    halves = [small[0], small[2]]
    assert halves[0][0].weight is halves[1][0].weight
    assert halves[0][1].weight is halves[1][1].weight


def test_what_only_training_uses_is_gone(factor, distance):
    model = factor(Auxiliary()).double()
    done = compaction(model)
    assert done.removed == ("aux",)
    assert not any(name.startswith("aux") for name in done.model.state_dict())
    assert distance(model, done.model, torch.randn(4, 24)) < ROUNDING


def test_attention_keeps_its_products_small(factor):
    small = compact(factor(Attending(), 4))
    (attention,) = (m for m in small.modules() if isinstance(m, FactoredAttention))
    assert [tuple(half.weight.shape) for half in attention.in_proj] == [(4, 32), (96, 4)]
    assert max(p.numel() for p in small.parameters()) < 32 * 32


def test_a_weight_read_by_a_convolution_function_is_multiplied_out(factor, distance):
    layer = nn.Conv2d(8, 8, 3)
    net = Around(lambda m, x: F.conv2d(x, m.layer.weight, m.layer.bias), layer=layer)
    model = factor(net, 2).double()
    done = compaction(model)
    assert done.merged == ("layer",)
    assert distance(model, done.model, torch.randn(2, 8, 9, 9)) < ROUNDING


def test_a_dense_model_is_folded_by_the_same_road(stir, distance):
    model = stir(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()))
    done = compaction(model.double())
    assert done.folded == ("1",)
    assert done.ranks == {}
    assert distance(model, done.model, torch.randn(2, 3, 9, 9)) < ROUNDING


def test_parametrized_weights_come_out_plain(distance):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(24, 24))
    model = nn.Sequential(layer, nn.ReLU()).double()
    small = compact(convert(model, plan(model, "energy=0.9")))
    assert set(small.state_dict()) <= {"0.weight", "0.bias", "0.0.weight", "0.1.weight", "0.1.bias"}
    again = compact(model)
    assert set(again.state_dict()) == {"0.weight", "0.bias"}
    assert distance(model, again, torch.randn(3, 24)) < ROUNDING
