"""A plan that was edited counts for its schemes and ranks; what follows from them is found anew."""

import json

import pytest
import torch
from torch import nn

from converter.convert import convert, plan, revise
from converter.cost import count_parameters
from converter.errors import StiefelError
from converter.rank_plan import RankPlan

MODEL = nn.Sequential(
    *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1)),
    *(nn.Conv2d(32, 48, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
)
EXAMPLE = torch.randn(2, 3, 12, 12)


@pytest.mark.parametrize("calibrated", [False, True])
def test_of_an_edited_plan_schemes_and_ranks_count_and_all_else_is_found_anew(calibrated):
    images = torch.randn(8, *EXAMPLE.shape[1:]) if calibrated else None
    by = {"example": EXAMPLE, "calibration": images}
    made = plan(MODEL, 4, scheme="channel", **by)
    data = json.loads(made.to_json())
    # Rank 40 is more than the channel scheme has.
    data["layers"][1] |= {"rank": 40, "scheme": "spatial", "dense_parameters": 0}
    data["dense_parameters"] = 0
    found = revise(MODEL, RankPlan.from_json(json.dumps(data)), **by)
    asked = {"2": {"rank": 40, "scheme": "spatial"}}
    wanted = plan(MODEL, 4, scheme="channel", layers=asked, **by)
    assert found.without_spectra() == wanted.without_spectra()
    assert found["2"].expected_error != made["2"].expected_error
    small = convert(MODEL, found)
    assert count_parameters(small) == found.factored_parameters
    assert small.stiefel_plan == found.without_spectra()


def test_the_model_keeps_the_errors_of_the_ranks_that_it_was_converted_to():
    made = plan(MODEL, 6)
    data = json.loads(made.to_json())
    data["layers"][1]["rank"] = 3
    kept = convert(MODEL, RankPlan.from_json(json.dumps(data))).stiefel_plan
    assert kept["2"].expected_error == pytest.approx(made.with_rank("2", 3)["2"].expected_error)


def test_of_a_plan_with_layers_taken_out_these_are_kept_dense():
    data = json.loads(plan(MODEL, 4).to_json())
    del data["layers"][1]
    found = revise(MODEL, RankPlan.from_json(json.dumps(data)))
    assert (found["2"].rank, found["2"].reason) == (None, "not in the plan")


def test_an_edited_plan_of_another_model_is_refused():
    made = RankPlan.from_json(plan(MODEL, 4).to_json())
    with pytest.raises(StiefelError, match="'2' is not in the model"):
        revise(nn.Sequential(nn.Linear(9, 9)), made)


def test_a_plan_keeps_its_latency_until_its_schemes_or_ranks_are_edited():
    made = plan(MODEL, 4)
    latency = {"dense_latency_ms": 3.0, "factored_latency_ms": 2.0, "timed": made.fingerprint}
    made = made.model_copy(update=latency)
    data = json.loads(made.to_json())

    def kept(found):
        return found.dense_latency_ms, found.factored_latency_ms

    def read(**edit):
        data["layers"][1] |= edit
        return RankPlan.from_json(json.dumps(data))

    assert kept(read()) == kept(revise(MODEL, read())) == (3.0, 2.0)
    assert kept(convert(MODEL, read()).stiefel_plan) == (3.0, 2.0)
    assert kept(made.with_rank("2", 3)) == kept(read(rank=3)) == (3.0, None)
    assert kept(revise(MODEL, read())) == (3.0, None)
    assert kept(read(rank=made["2"].rank)) == (3.0, 2.0)
    assert kept(read(scheme="channel")) == (3.0, None)
    data["timed"] = None  # written before it was recorded what was timed
    assert kept(read(scheme="spatial")) == (3.0, None)
