"""Layers that share U, S and V go on sharing them when their rank falls."""

import pytest
import torch
from torch import Tensor, nn

from converter.convert import convert, plan
from converter.cost import count_parameters
from converter.errors import StiefelError
from converter.factors import FactoredLinear
from trainers.rank_schedule import RankSchedule, look
from trainers.rules import BP, SSA
from trainers.trainer import TrainSettings, train_local


class Tied(nn.Module):
    """Two layers of one weight, each with a bias of its own if any; or one layer used twice."""

    def __init__(self, twice: bool = False, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.flatten, self.first = nn.Flatten(), nn.Linear(64, 24)
        self.one = nn.Linear(24, 24, bias=bias)
        self.two = self.one if twice else nn.Linear(24, 24, bias=bias)
        self.two.weight = self.one.weight
        torch.manual_seed(2)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(self.flatten(x)))
        h = torch.relu(self.one(h))
        return self.head(torch.relu(self.two(h)))


def factored(rank: int | str = 8, **kind) -> nn.Module:
    dense = Tied(**kind)
    return convert(dense, plan(dense, rank))


def settings(**changes) -> TrainSettings:
    ranks = RankSchedule(final=4, floor=2, start=2, end=3)
    plain = {"epochs": 4, "batch_size": 16, "device": "cpu", "ranks": ranks, "clip": 1.0}
    return TrainSettings(**{**plain, **changes})


def are_tied(model: nn.Module) -> bool:
    pairs = zip(model.one.factors(), model.two.factors(), strict=True)
    return all(one is two for one, two in pairs)


@pytest.mark.parametrize("rule", [BP(), SSA(boundaries="units")], ids=["bp", "ssa"])
def test_tied_layers_stay_tied_and_go_on_training_when_ranks_fall(rule, data):
    model, seen = factored(), []
    assert are_tied(model)

    def look_on(now):
        if now.get("epoch_done"):
            seen.append([p.detach().clone() for p in (*model.two.factors(), model.two.bias)])

    history = train_local(model, data, rule=rule, settings=settings(), progress=look_on)
    assert [record["ranks"]["two"] for record in history.records] == [8, 6, 4, 4]
    assert are_tied(model)
    assert model.one.bias is not model.two.bias
    assert not any(torch.equal(*pair) for pair in zip(*seen[2:], strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("final", ["4", "params=0.5"])
def test_two_tied_layers_train_as_one_layer_does_that_is_used_twice(final, optimizer, data):
    ranks = RankSchedule(final=final, floor=2, start=2, end=3)
    found = []
    for twice in (True, False):
        model = factored(rank="0.4", twice=twice, bias=False)
        train_local(model, data, rule=BP(), settings=settings(ranks=ranks, optimizer=optimizer))
        found.append({name: p.detach() for name, p in model.named_parameters()})
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_resuming_a_run_of_tied_layers_changes_nothing(data, tmp_path):
    def die(now):
        if now.get("epoch_done") and now["epoch"] == 3:
            raise MemoryError

    whole, model = factored(), factored()
    train_local(whole, data, settings=settings(), out=tmp_path / "whole")
    rest = {"settings": settings(), "out": tmp_path / "halves"}
    with pytest.raises(MemoryError):
        train_local(factored(), data, progress=die, **rest)
    train_local(model, data, resume=True, **rest)
    assert are_tied(model)
    one, other = (
        torch.load(rest["out"].parent / name / "state.pt", weights_only=True)
        for name in ("whole", "halves")
    )
    for part in ("network", "state"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    kept = [state["update"]["optimizer"]["state"] for state in (one, other)]
    torch.testing.assert_close(*kept, rtol=0, atol=0)


def test_a_parameter_budget_counts_tied_layers_once(data):
    dense, model = Tied(), factored(rank="0.4")
    found = look(model)
    assert found.dense == count_parameters(dense)
    assert found.parameters(found.ranks()) == count_parameters(model)
    ranks = RankSchedule(final="params=0.5", floor=1, start=2, end=3)
    train_local(model, data, rule=BP(), settings=settings(ranks=ranks, epochs=3))
    room = 0.5 * count_parameters(dense) - count_parameters(model)
    # Less is left than one more direction of the smallest layer would take.
    assert 0 <= room < min(layer.cost for layer in found.layers.values())


def test_layers_that_share_some_factors_only_are_refused_where_ranks_are_to_fall(data):
    model = factored()
    model.two = FactoredLinear(model.one.U, model.two.S.detach().clone(), model.one.V)
    with pytest.raises(StiefelError, match="layers one and two share some of U, S and V"):
        train_local(model, data, rule=BP(), settings=settings())
    train_local(model, data, rule=BP(), settings=settings(ranks=RankSchedule(), epochs=1))
