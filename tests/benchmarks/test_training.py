import json

import pytest
from click.testing import CliRunner

from benchmarks import training
from benchmarks.training import SCALES, TABLE, main
from trainers.history import History

ROWS = ("backpropagation, factored", "SSA, layer-wise")


def run(path, *words):
    methods = [word for row in ROWS for word in ("--methods", row)]
    basic = ["--scale", "tiny", "--data", "fake:3x32x32", "--seeds", "1", "--out", str(path)]
    return CliRunner().invoke(main, [*basic, *methods, *words], catch_exceptions=False)


def test_a_comparison_writes_rows_a_table_and_a_plot_and_is_not_measured_twice(
    tmp_path, monkeypatch
):
    path = tmp_path / "t.json"
    assert run(path).exit_code == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["network"], row["method"]) for row in rows] == [("smallconv", m) for m in ROWS]
    assert rows[0]["parameters"] == rows[1]["parameters"]
    assert rows[1]["activation_memory_mib"] < rows[0]["activation_memory_mib"]
    assert "| smallconv, SSA, layer-wise |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(training, "_trained", lambda *_: pytest.fail("measured again"))
    assert run(path).exit_code == 0


def test_rates_are_chosen_on_training_images_held_back(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "RATES", (1e-3,))
    monkeypatch.setattr(training, "TABLE", {ROWS[0]: TABLE[ROWS[0]]})
    evaluate = training.evaluate
    monkeypatch.setattr(
        training, "evaluate", lambda m, d, **k: seen.append(len(d)) or evaluate(m, d, **k)
    )
    assert run(tmp_path / "t.json", "--select").exit_code == 0
    assert seen == [SCALES["tiny"].held_back]


@pytest.mark.parametrize("select", [(), ("--select",)])
def test_rates_may_be_given(select, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(
        training,
        "_trained",
        lambda network, method, settings, *_: trained.append(settings.lr) or {"accuracy": 1.0},
    )
    monkeypatch.setattr(training, "_table", lambda study: "")
    monkeypatch.setattr(training, "_draw", lambda *_: None)
    assert run(tmp_path / "t.json", *select, "--lr", "0.1", "--lr", "0.2").exit_code == 0
    assert trained == [0.1, 0.2, 0.1, 0.2]
    assert [row["lr"] for row in json.loads((tmp_path / "t.json").read_text())["rows"]] == trained


def test_half_a_training_is_no_row(tmp_path, monkeypatch):
    history = History(records=[], best_accuracy=0.0, interrupted=True)
    monkeypatch.setattr(training, "train_local", lambda *_, **__: history)
    assert run(tmp_path / "t.json").exit_code == 1
    assert not (tmp_path / "t.json").exists()
