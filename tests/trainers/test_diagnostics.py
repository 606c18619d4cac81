"""Diagnostics tell the truth, and training doesn't notice them."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from converter.factors import factored_layers
from tests.trainers.networks import digits_network
from trainers.data import Data, examples, load_data
from trainers.diagnostics import Diagnostics, weighted_modules
from trainers.manifold import departure
from trainers.rank_schedule import RankSchedule
from trainers.rules import BP, DFA, SSA, make_rule
from trainers.trainer import TrainSettings, train_local


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data("digits", limit_train=200, limit_test=100)


network = partial(digits_network, dropout=0.2)


def looked(settings, model, data, **options) -> tuple[dict, Diagnostics]:
    rule = make_rule(settings)
    x, _ = examples(data.train, 32)
    state = rule.init(model, x, 10, torch.Generator().manual_seed(0))
    diagnostics = Diagnostics(model, rule, state, data, images=32, seed=0, **options)
    return diagnostics(), diagnostics


def settings(**changes) -> TrainSettings:
    return TrainSettings(**{"epochs": 2, "batch_size": 50, "device": "cpu", **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ranks": RankSchedule(final="0.2", start=2, end=2, floor=2)},
        {"precision": "bf16", "batch_norm": "frozen"},
    ],
)
@pytest.mark.parametrize("rule", [SSA(), DFA(storage="recomputed"), BP()], ids=lambda r: r.name)
def test_training_is_the_same_bit_for_bit_with_and_without(rule, changes, data, tmp_path):
    ended = []
    for every in (0, 1):
        model = network()
        chosen = settings(diagnostics=every, **changes)
        out = tmp_path / str(every)
        history = train_local(model, data, rule=rule, settings=chosen, out=out)
        ended.append((model.state_dict(), [r["loss"] for r in history.records]))
        assert [look["epoch"] for look in history.diagnostics] == ([0, 1, 2] if every else [])
    (one, losses), (other, same) = ended
    assert losses == same
    assert all(torch.equal(one[key], other[key]) for key in one)
    lines = (tmp_path / "1" / "diagnostics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history.diagnostics
    assert not (tmp_path / "0" / "diagnostics.jsonl").exists()


def test_backprop_points_where_backprop_points(data):
    found, _ = looked(BP(), network(), data, label_smoothing=0.1)
    assert list(found["layers"]) == ["0", "3", "7"]
    for line in found["layers"].values():
        assert line["cosine"] == pytest.approx(1, abs=1e-12)
        assert line["angle_deg"] == pytest.approx(0, abs=1e-4)
        assert line["norm_ratio"] == pytest.approx(1)
        assert set(line["factor_cosines"].values()) == {line["cosine"]} or all(
            value == pytest.approx(1, abs=1e-12) for value in line["factor_cosines"].values()
        )


def test_the_output_layer_of_a_local_rule_is_backprop_s_too_and_earlier_ones_are_not(data):
    found, _ = looked(SSA(similarity=0), network(), data)
    # The head belongs to the last block, whose loss is the output's own.
    assert found["layers"]["7"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert -1 <= found["layers"]["0"]["cosine"] < 0.99


def test_cosine_and_norms_are_those_of_gradients_taken_by_hand(data):
    model = network()
    model[5].p = 0.0
    chosen = DFA()
    rule, reference = make_rule(chosen), copy.deepcopy(model)
    found, diagnostics = looked(chosen, model, data)
    x, y = diagnostics.batch
    state = rule.init(reference, x, 10, torch.Generator().manual_seed(0))
    rule.step(reference, state, x, y)
    local = {n: p.grad.clone() for n, p in reference.named_parameters()}
    reference.zero_grad()
    F.cross_entropy(reference(x), y).backward()
    for name, module in weighted_modules(reference).items():
        parts = [n for n, p in module.named_parameters() if p.ndim > 1 or n == "S"]
        mine, true = (
            torch.cat([grads(f"{name}.{part}").flatten() for part in parts])
            for grads in (local.__getitem__, lambda key: reference.get_parameter(key).grad)
        )
        line = found["layers"][name]
        expected = min(1.0, F.cosine_similarity(mine.double(), true.double(), dim=0).item())
        assert line["cosine"] == pytest.approx(expected, abs=1e-5)
        assert line["angle_deg"] == pytest.approx(math.degrees(math.acos(expected)), abs=0.05)
        assert line["norm_ratio"] == pytest.approx((mine.norm() / true.norm()).item(), rel=1e-4)


def test_rank_and_departure_are_the_layers_own(data):
    model = network()
    with torch.no_grad():
        factored_layers(model)["3"].V.mul_(1.5)
    found, _ = looked(SSA(), model, data)
    for name, layer in factored_layers(model).items():
        line = found["layers"][name]
        assert line["rank"] == layer.rank
        assert line["departure"] == pytest.approx(departure(layer.V.detach()).item(), rel=1e-5) or (
            line["departure"] < 1e-4
        )
    assert found["layers"]["3"]["departure"] > 1
    assert "rank" not in found["layers"]["0"]


@pytest.mark.parametrize(
    ("rule", "reads"),
    [
        (SSA(), True),
        (SSA(cross_entropy=0), False),  # there, but nothing trains it
        (SSA(readout=1000), True),
        (SSA(feedback="kolen-pollack"), True),
        (SSA(feedback="kolen-pollack", error="global"), False),
        (DFA(), False),
        (BP(), False),
    ],
)
def test_read_outs_are_the_rule_s_own_and_probes_are_there_for_every_rule(rule, reads, data):
    found, diagnostics = looked(rule, network(), data)
    *blocks, last = found["blocks"].values()
    assert len(blocks) == 1
    assert [block["loss"] is not None for block in [*blocks, last]] == [rule.name != "bp"] * 2
    for readout in (r for block in blocks for r in block["readouts"].values()):
        assert (readout["readout_accuracy"] is not None) == reads
        # Ten classes: even untrained features tell digits apart, if linearly probed.
        assert readout["probe_accuracy"] > 0.6
    x, y = diagnostics.test
    model = diagnostics.network.eval()
    for readout in last["readouts"].values():
        own = (model(x).argmax(1) == y).double().mean().item()
        assert readout["readout_accuracy"] == own


def test_read_outs_see_the_test_images_in_parts_alike():
    odd, model, seen = load_data("digits", limit_train=60, limit_test=257), network(), []
    _, diagnostics = looked(SSA(), model, odd)
    next(model.children()).register_forward_hook(lambda m, i, output: seen.append(len(output)))
    diagnostics()
    assert {86, 85} <= set(seen)
    assert min(seen) > 30


def test_a_network_that_cannot_be_traced_still_has_its_angles(data):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x if x.sum() < 1e9 else x / 2)

    found, _ = looked(BP(), Branching(), data)
    assert found["blocks"] == {}
    assert found["layers"]["inner.3"]["cosine"] == pytest.approx(1)


def test_a_resumed_run_has_every_look_once(data, tmp_path):
    def stop(now):
        if now.get("epoch_done") and now["epoch"] == 1:
            raise MemoryError

    rest = {"settings": settings(diagnostics=1), "out": tmp_path}
    with pytest.raises(MemoryError):
        train_local(network(), data, progress=stop, **rest)
    resumed = train_local(network(), data, resume=True, **rest)
    whole = train_local(network(), data, settings=rest["settings"])
    assert resumed.diagnostics == whole.diagnostics
