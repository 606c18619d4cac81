from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from converter.convert import convert, plan
from converter.cost import count_parameters
from converter.errors import StiefelError
from converter.factors import FactoredConv2d, factored_layers
from trainers.rank_schedule import (
    LayerRank,
    ModelRanks,
    RankSchedule,
    check_schedule,
    falls,
    look,
    lowered,
    shortfall,
)

layers = st.builds(
    lambda S, m, n: LayerRank(
        torch.tensor(sorted((s * s for s in S), reverse=True), dtype=torch.float64),
        full_rank=len(S) + 2,
        cost=m + n + 1,
        dense=(m + len(S)) * (n + len(S)),
    ),
    st.lists(st.floats(1e-3, 10), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(1, 40),
)
models = st.builds(
    lambda made, rest: ModelRanks({f"l{i}": layer for i, layer in enumerate(made)}, rest),
    st.lists(layers, min_size=1, max_size=5),
    st.integers(0, 200),
)
finals = st.sampled_from([None, "3", "0.25", "energy=0.7", "params=0.9", "params=0.2"])
schedules = st.builds(
    RankSchedule,
    final=finals,
    energy=st.floats(0.1, 1),
    floor=st.integers(1, 5),
    start=st.integers(1, 3),
    every=st.integers(1, 3),
) | st.builds(
    RankSchedule, final=finals.filter(lambda final: final is not None), floor=st.integers(1, 5)
)


def cut(model: ModelRanks, ranks: dict[str, int]) -> ModelRanks:
    kept = model.kept_at(ranks)
    layers = {
        name: replace(layer, energies=layer.energies[: ranks[name]], kept=kept[name])
        for name, layer in model.layers.items()
    }
    return ModelRanks(layers, model.rest)


@given(models, schedules, st.integers(4, 20))
def test_ranks_never_rise_and_respect_floor_and_energy(model, schedule, epochs):
    first, start = model, model.ranks()
    try:
        check_schedule(schedule, epochs, model)
    except StiefelError:
        return
    for epoch in range(1, epochs + 1):
        ranks = lowered(schedule, epoch, epochs, model, start)
        for name, layer in model.layers.items():
            assert 1 <= ranks[name] <= layer.rank
            assert ranks[name] >= min(layer.rank, schedule.floor)
            if schedule.energy:
                energies = first.layers[name].energies
                assert energies[: ranks[name]].sum() >= (schedule.energy - 1e-9) * energies.sum()
        model = cut(model, ranks)


@given(models, st.floats(0.05, 1), st.sampled_from(["final", "energy"]), st.integers(4, 20))
def test_falls_in_parts_keep_as_much_energy_as_one(model, share, key, epochs):
    value = f"energy={share}" if key == "final" else share
    schedule = RankSchedule(**{key: value}, floor=1)
    first, start = model, model.ranks()
    for epoch in falls(schedule, epochs):
        model = cut(model, lowered(schedule, epoch, epochs, model, start))
    for name, layer in first.layers.items():
        # A direction at the very limit may be kept or not, by rounding.
        assert layer.energy_rank(share - 1e-9) <= model.layers[name].rank
        assert model.layers[name].rank <= layer.energy_rank(min(1, share + 1e-9))


@given(models, st.floats(0.05, 1))
def test_the_energy_rank_is_the_smallest_that_holds_the_share(model, share):
    for layer in model.layers.values():
        rank = layer.energy_rank(share)
        total = layer.energies.sum()
        assert layer.energies[:rank].sum() >= (share - 1e-9) * total
        assert rank == 1 or layer.energies[: rank - 1].sum() < share * total


@given(models, st.floats(0.05, 1), st.integers(4, 20))
def test_the_parameter_target_is_met_on_the_last_fall(model, fraction, epochs):
    schedule = RankSchedule(final=f"params={fraction}", floor=1)
    try:
        check_schedule(schedule, epochs, model)
    except StiefelError:
        return
    start = model.ranks()
    for epoch in falls(schedule, epochs):
        model = cut(model, lowered(schedule, epoch, epochs, model, start))
    left = model.parameters(model.ranks())
    assert left <= fraction * model.dense * (1 + 1e-9)
    # Nothing more than one direction of some layer could have been kept besides.
    room = fraction * model.dense - left
    assert all(
        model.layers[name].rank == start[name] or layer.cost > room
        for name, layer in model.layers.items()
    )


def test_a_layer_that_was_zero_is_protected_by_its_energy_like_any_other():
    zero, alike = (LayerRank(torch.full((8,), e, dtype=torch.float64), 8, 2, 64) for e in (0, 1))
    assert zero.kept_at(4) == 1
    later = replace(alike, kept=zero.kept_at(4))
    assert later.energy_rank(0.75) == alike.energy_rank(0.75) == 6
    model = ModelRanks({"zero": zero, "other": alike}, 0)
    schedule = RankSchedule(final="params=0.15", start=1, end=1, floor=2)
    assert lowered(schedule, 1, 1, model, model.ranks()) == {"zero": 2, "other": 7}


def test_ranks_fall_in_equal_parts_and_end_on_the_final_rank():
    layer = LayerRank(torch.ones(40, dtype=torch.float64), full_rank=64, cost=1, dense=1000)
    model = ModelRanks({"l": layer}, 0)
    schedule = RankSchedule(final=8, floor=1, start=2, end=8, every=2)
    found = []
    for epoch in range(1, 11):
        ranks = lowered(schedule, epoch, 10, model, {"l": 40})
        found.append(ranks["l"])
        model = cut(model, ranks)
    assert falls(schedule, 10) == [2, 4, 6, 8]
    assert found == [40, 32, 32, 24, 24, 16, 16, 8, 8, 8]


@pytest.mark.parametrize(
    ("final", "energy", "says"),
    [
        ("2", None, None),
        ("2", 0.999, "final 2 was not reached: l has rank 8 and 1 more layers"),
        ("params=0.2", None, None),
        ("params=0.2", 0.999, "final params=0.2 was not reached: 0.4"),
        ("energy=0.5", 0.999, None),  # a share of what each layer has; there is no total to miss
        (None, 0.999, None),
    ],
)
def test_what_energy_keeps_from_the_target_is_told(final, energy, says):
    layer = LayerRank(torch.ones(8).double(), full_rank=32, cost=50, dense=1000)
    model = ModelRanks({"l": layer, "m": layer}, 0)
    schedule = RankSchedule(final=final, energy=energy, floor=1)
    start = model.ranks()
    for epoch in falls(schedule, 12):
        model = cut(model, lowered(schedule, epoch, 12, model, start))
    told = shortfall(schedule, model)
    assert (told or "").startswith(says or "")
    assert (told is None) == (says is None)


@pytest.mark.parametrize("key", ["floor", "start", "end", "every"])
def test_how_ranks_fall_is_not_said_where_they_do_not(key):
    with pytest.raises(ValidationError, match=f"{key} says how ranks fall: give final or energy"):
        RankSchedule(**{key: 7})


def test_it_is_off_by_default():
    model = ModelRanks({"l": LayerRank(torch.ones(4).double(), 4, 1, 10)}, 0)
    assert falls(RankSchedule(), 10) == []
    assert lowered(RankSchedule(), 5, 10, model, {"l": 4}) == {"l": 4}


@pytest.mark.parametrize(
    ("final", "says"),
    [
        ("12", r"asks for rank 12 in layer l, which has rank 8"),
        ("0.5", r"asks for rank 16 in layer l, which has rank 8"),
        ("params=0.9", r"params=0.9 is above the 0.400 of the dense model's parameters"),
        ("params=0.0001", r"out of reach"),
    ],
)
def test_a_target_that_cannot_be_is_one_clear_error(final, says):
    layer = LayerRank(torch.ones(8).double(), full_rank=32, cost=50, dense=1000)
    with pytest.raises(StiefelError, match=says):
        check_schedule(RankSchedule(final=final), 10, ModelRanks({"l": layer}, 0))


def test_a_rank_above_the_full_rank_of_a_small_layer_is_no_error():
    layer = LayerRank(torch.ones(8).double(), full_rank=8, cost=50, dense=1000)
    check_schedule(RankSchedule(final=12), 10, ModelRanks({"l": layer}, 0))


def test_one_rank_for_all_leaves_layers_below_it_as_they_are():
    ranks = {"wide": 8, "narrow": 3}
    layers = {
        name: LayerRank(torch.ones(rank).double(), full_rank=32, cost=50, dense=1000)
        for name, rank in ranks.items()
    }
    schedule, model = RankSchedule(final=5, floor=1, end=10), ModelRanks(layers, 0)
    check_schedule(schedule, 10, model)
    assert lowered(schedule, 10, 10, model, ranks) == {"wide": 5, "narrow": 3}
    with pytest.raises(StiefelError, match="rank 9 in layer wide, which has rank 8"):
        check_schedule(RankSchedule(final=9), 10, model)
    with pytest.raises(StiefelError, match="rank 4 in layer narrow, which has rank 3"):
        check_schedule(RankSchedule(final="0.125"), 10, model)


def test_a_schedule_without_factored_layers_or_after_the_end_is_an_error():
    with pytest.raises(StiefelError, match="no factored layer"):
        check_schedule(RankSchedule(final=4), 10, ModelRanks({}, 10))
    layer = LayerRank(torch.ones(8).double(), full_rank=8, cost=50, dense=1000)
    with pytest.raises(StiefelError, match="epoch 12 never comes in 10 epochs"):
        check_schedule(RankSchedule(final=4, end=12), 10, ModelRanks({"l": layer}, 0))


@pytest.mark.parametrize("final", ["macs=0.5", "latency=0.5", "much", "params=2"])
def test_a_final_rank_that_means_nothing_here_is_refused_when_written(final):
    with pytest.raises(ValidationError, match="final"):
        RankSchedule(final=final)


def test_looking_at_a_model_counts_as_converter_does():
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(4, 12, 3), nn.Conv2d(12, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 6)
    )
    model = convert(dense, plan(dense, 2))
    found = look(model)
    assert list(found.layers) == list(factored_layers(model))
    assert found.dense == count_parameters(dense)
    assert found.parameters(found.ranks()) == count_parameters(model)
    layer = next(m for m in model.modules() if isinstance(m, FactoredConv2d) and m.groups == 2)
    energies = layer.S.detach().double().square().sum(0).sort(descending=True).values
    torch.testing.assert_close(found.layers["1"].energies, energies)
