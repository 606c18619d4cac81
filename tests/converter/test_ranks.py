"""Policies give the ranks they say, budgets are met or refused, plans can be read and edited."""

import itertools
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from converter.convert import convert, plan
from converter.cost import count_macs, count_parameters
from converter.errors import StiefelError
from converter.rank_plan import RankPlan
from converter.ranks import (
    Budget,
    Energy,
    Fixed,
    Fraction,
    Option,
    meet_budget,
    parse_rank,
)


def net() -> nn.Module:
    """A little of everything: first convolution, strides, groups, 1×1, depthwise, linear."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.Conv2d(32, 32, 3, padding=1, groups=32)),
        *(nn.Conv2d(32, 48, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


MODEL, EXAMPLE = net(), torch.randn(2, 3, 12, 12)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("32", Fixed(rank=32)),
        (32, Fixed(rank=32)),
        ("rank=32", Fixed(rank=32)),
        ("0.25", Fraction(fraction=0.25)),
        (1.0, Fraction(fraction=1.0)),
        (" Fraction = 0.25 ", Fraction(fraction=0.25)),
        ("energy=0.95", Energy(energy=0.95)),
        ("params=0.5", Budget(params=0.5)),
        ("macs=0.5", Budget(macs=0.5)),
        ("latency=0.5", Budget(latency=0.5)),
        (Budget(macs=0.5), Budget(macs=0.5)),
    ],
)
def test_policies_are_read_as_they_are_written(text, policy):
    assert parse_rank(text) == policy
    assert parse_rank(str(policy)) == policy


@pytest.mark.parametrize(
    "text",
    ["0", "-3", "1.5", "0.0", "-0.1", "nan", "inf", "", "=", "half", "energy=0", "energy=1.1",
     "params=0", "params=2", "memory=0.5", "params=0.5=0.5", "params=", "1e", "True", "²"],
)  # fmt: skip
def test_what_is_no_policy_is_refused_with_the_ones_there_are(text):
    with pytest.raises(StiefelError, match=rf"rank '{text}' is not understood: give a rank of"):
        parse_rank(text)


@pytest.mark.parametrize("fields", [{}, {"params": 0.5, "macs": 0.5}])
def test_a_budget_is_of_one_cost(fields):
    with pytest.raises(ValueError, match="exactly one of params, macs, latency"):
        Budget(**fields)


def test_a_fixed_rank_is_given_to_every_layer_that_it_makes_smaller():
    made = plan(MODEL, 6)
    assert {entry.name: entry.rank for entry in made.factored} == {
        "3": 6,
        "5": 6,
        "7": 6,
        "11": 6,
        "13": 6,
    }
    assert "rank 20 would not save parameters; 18 or less would" in plan(MODEL, 20)["7"].reason
    assert "first convolution" in made["0"].reason
    assert "depthwise" in made["6"].reason
    with pytest.raises(StiefelError, match="rank 999 is not possible; choose 1 to 48"):
        plan(MODEL, 999)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 1.0])
def test_a_fraction_is_of_each_layers_full_rank(fraction):
    for entry in plan(MODEL, fraction).layers:
        if entry.rank is not None:
            assert entry.rank == max(1, round(fraction * entry.full_rank))
            assert entry.factored_parameters < entry.dense_parameters


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_keeps_just_enough_of_it(energy):
    everything = {"*": {"rank": f"energy={energy}"}}
    for entry in plan(MODEL, f"energy={energy}", layers=everything).factored:
        weight = MODEL.get_submodule(entry.name).weight.detach()
        matrix = weight
        if weight.ndim == 4:
            matrix = weight.movedim(-1, 1).reshape(entry.groups, -1, weight[0, :, :, 0].numel())
        squares = torch.linalg.svdvals(matrix).square().reshape(-1, entry.full_rank).sum(0)
        kept = squares.cumsum(0) / squares.sum()
        assert kept[entry.rank - 1] >= energy - 1e-6
        assert entry.rank == 1 or kept[entry.rank - 2] < energy
        assert entry.expected_error == pytest.approx(
            (1 - float(kept[entry.rank - 1])) ** 0.5, abs=1e-3
        )


@settings(max_examples=15)
@given(
    cost=st.sampled_from(["params", "macs"]),
    fraction=st.floats(0.3, 1.0),
    scheme=st.sampled_from(["spatial", "channel", "auto"]),
)
def test_a_budget_is_met_within_a_percent_and_never_exceeded(cost, fraction, scheme):
    try:
        made = plan(MODEL, Budget(**{cost: fraction}), scheme=scheme, example=EXAMPLE)
    except StiefelError as error:  # one rank of a convolution here is 4 % of the MACs
        assert cost == "macs"
        fraction = float(re.search(r"the nearest below is macs=(0\.\d+)$", str(error))[1])
        made = plan(MODEL, Budget(macs=fraction), scheme=scheme, example=EXAMPLE)
    small = convert(MODEL, made)
    if cost == "params":
        whole, kept = count_parameters(MODEL), count_parameters(small)
        assert kept == made.factored_parameters
    else:
        whole, kept = count_macs(MODEL, EXAMPLE), count_macs(small, EXAMPLE)
        assert kept == made.factored_macs
    assert kept <= fraction * whole
    lossless = all(entry.rank is None for entry in made.layers)
    assert lossless or kept >= (fraction - 0.01) * whole


@pytest.mark.parametrize("cost", ["params", "macs"])
def test_a_budget_out_of_reach_says_what_is_and_that_is(cost):
    with pytest.raises(
        StiefelError, match=rf"{cost}=0.01 is out of reach: .* {cost}=(0\.\d+) is left"
    ) as caught:
        plan(MODEL, f"{cost}=0.01", example=EXAMPLE)
    least = str(caught.value).split()[-3]
    assert plan(MODEL, least, example=EXAMPLE).factored


def test_budgets_of_work_need_an_example():
    for cost in ("macs", "latency"):
        with pytest.raises(StiefelError, match="needs an example"):
            plan(MODEL, f"{cost}=0.5")


OPTIONS = st.lists(
    st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1)), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


@given(OPTIONS, st.floats(0.05, 1.0), st.integers(0, 10))
def test_no_choice_within_the_budget_is_much_better(layers, fraction, rest):
    """Against every combination: the multiplier's choice, topped up, lies near the optimum."""
    options = [
        [
            Option(None, None, 20.0, 0.0),
            *(Option(None, i + 1, float(c), loss) for i, (c, loss) in enumerate(layer)),
        ]
        for layer in layers
    ]
    whole = 20.0 * len(layers) + rest
    fitting = [
        sum(o.loss for o in combination)
        for combination in itertools.product(*options)
        if sum(o.cost for o in combination) + rest <= fraction * whole + 1e-6
    ]
    if not fitting:
        with pytest.raises(StiefelError, match="out of reach"):
            meet_budget(options, Budget(params=fraction), whole, rest, slack=1.0)
        return
    chosen = meet_budget(options, Budget(params=fraction), whole, rest, slack=1.0)
    assert sum(o.cost for o in chosen) + rest <= fraction * whole + 1e-6
    # A Lagrangian choice is optimal but for one layer's indivisible step.
    assert sum(o.loss for o in chosen) <= min(fitting) + 1.0 + 1e-9


def test_a_budget_between_two_coarse_options_says_the_nearest():
    options = [[Option(None, None, 10.0, 0.0), Option(None, 1, 2.0, 0.5)]]
    with pytest.raises(
        StiefelError, match=r"cannot be met within 1%: the nearest below is params=0\.2"
    ):
        meet_budget(options, Budget(params=0.9), whole=10.0, rest=0.0)


def test_coarse_options_are_combined_until_they_fill_the_budget():
    # By price alone the second layer is never at 3: 6 + 3 fills the budget of 9, 6 + 2 does not.
    first = [Option(None, None, 10.0, 0.0), Option(None, 6, 6.0, 0.1), Option(None, 1, 1.0, 0.9)]
    second = [Option(None, None, 10.0, 0.0), Option(None, 3, 3.0, 0.8), Option(None, 2, 2.0, 0.8)]
    chosen = meet_budget([first, second], Budget(params=0.45), whole=20.0, rest=0.0)
    assert [option.rank for option in chosen] == [6, 3]


def test_the_last_glob_that_matches_wins():
    made = plan(
        MODEL,
        "params=0.6",
        layers={"*": {"scheme": "channel"}, "1*": "keep", "13": {"rank": 2}, "3": {"rank": "0.5"}},
    )
    assert (made["3"].rank, made["3"].scheme) == (24, "spatial")
    assert (made["11"].rank, made["11"].reason) == (None, "kept by request")
    assert made["13"].rank == 2
    assert {made[n].scheme for n in ("5", "7")} == {"channel"}
    assert made.factored_parameters <= 0.6 * made.dense_parameters


def test_a_rank_asked_for_by_name_is_obeyed_though_it_saves_nothing():
    made = plan(MODEL, 4, layers={"7": {"rank": 32}})
    assert made["7"].rank == 32
    assert made["7"].factored_parameters > made["7"].dense_parameters
    with pytest.raises(StiefelError, match="7: rank 33 is not possible; choose 1 to 32"):
        plan(MODEL, 4, layers={"7": {"rank": 33}})


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"conv*": "keep"}, r"no layer matches 'conv\*'; there are 0, 3, 5"),
        ({"3": "kepe"}, "'3' is 'kepe'; write keep, or a mapping with rank or scheme"),
        ({"3": {"ranks": 3}}, "write keep, or a mapping"),
        ({"3": {"rank": "params=0.5"}}, "one layer takes a rank, a fraction or energy"),
        ({"3": {"scheme": "diagonal"}}, "choose from spatial, channel, auto"),
        ({"3": {"rank": 0}}, "rank '0' is not understood"),
        ({"6": {"rank": 1}}, "6 cannot be factored: depthwise"),
    ],
)
def test_exceptions_that_cannot_be_are_refused(layers, words):
    with pytest.raises(StiefelError, match=words):
        plan(MODEL, 4, layers=layers)


def test_auto_takes_the_better_scheme_of_each_layer():
    # Of rank one by channels, and of rank one in space.
    channel, spatial = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        channel.weight.copy_(torch.einsum("n,chw->nchw", torch.randn(8), torch.randn(8, 3, 3)))
        spatial.weight.copy_(torch.einsum("nw,ch->nchw", torch.randn(8, 3), torch.randn(8, 3)))
    model = nn.Sequential(channel, spatial)
    for rank in (1, "energy=0.999", "params=0.3"):
        made = plan(model, rank, scheme="auto")
        assert [entry.scheme for entry in made.layers] == ["channel", "spatial"], rank


@pytest.mark.parametrize("rank", [6, "0.25", "energy=0.9", "params=0.5", "macs=0.5"])
def test_a_plan_survives_json_and_converts_the_same(rank):
    made = plan(MODEL, rank, scheme="auto", example=EXAMPLE)
    back = RankPlan.from_json(made.to_json())
    assert back == made.without_spectra()
    one, other = convert(MODEL, made), convert(MODEL, back)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.abs(), b.abs(), atol=1e-4, rtol=1e-4)


def test_an_edited_plan_counts_and_converts_anew():
    made = plan(MODEL, "params=0.5", example=EXAMPLE)
    data = json.loads(made.to_json())
    data["layers"][1]["rank"] = 3
    edited = RankPlan.from_json(json.dumps(data))
    assert edited["3"].rank == 3
    assert edited["3"].factored_parameters == 32 + 3 * (96 + 48 + 1)
    assert edited["3"].factored_macs == made.with_rank("3", 3)["3"].factored_macs
    assert count_parameters(convert(MODEL, edited)) == edited.factored_parameters
    assert made.with_rank("3", 3)["3"].expected_error > made["3"].expected_error
    kept = made.with_rank("3", None)
    assert (kept["3"].reason, kept["3"].expected_error) == ("kept by request", 0.0)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d["layers"][1].update(rank=0), "3: rank 0 is not possible; choose 1 to 48"),
        (lambda d: d["layers"][1].update(rank=49), "3: rank 49 is not possible; choose 1 to 48"),
        (lambda d: d["layers"][3].update(rank=4), "6: rank 4 is not possible; it can only be kept"),
        (lambda d: d["layers"][1].update(rank="x"), "layers.1.rank"),
        (lambda d: d["layers"][1].update(rnak=3), "layers.1.rnak"),
        (lambda d: d["layers"][1].update(scheme="diagonal"), "layers.1.scheme"),
        (lambda d: d["layers"].append(d["layers"][1]), "the plan has the layer '3' twice"),
        (lambda d: d.pop("layers"), "layers: Field required"),
    ],
)
def test_a_plan_edited_wrongly_names_the_fault(edit, words):
    data = json.loads(plan(MODEL, 4).to_json())
    edit(data)
    with pytest.raises(StiefelError, match=words):
        RankPlan.from_json(json.dumps(data))
    with pytest.raises(StiefelError, match="not a rank plan"):
        RankPlan.from_json("{")


def test_a_model_without_parameters_is_refused():
    with pytest.raises(StiefelError, match="no parameters"):
        plan(nn.Flatten(), 4)


def test_a_plan_names_the_layer_it_lacks():
    with pytest.raises(StiefelError, match="no layer 'heed'; did you mean head"):
        plan(nn.ModuleDict({"head": nn.Linear(9, 9)}), 2).with_rank("heed", 2)
