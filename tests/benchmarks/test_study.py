import json
import os
import time
from functools import partial

import pytest
import torch

from benchmarks.study import Study, held_back, markdown_table, matching, mean_sd
from converter.errors import StiefelError
from trainers.data import load_data

ABOUT = {"study": "s", "images": 3}


def test_what_was_measured_is_not_measured_again_after_an_interruption(tmp_path):
    path, calls = tmp_path / "s.json", []

    def work(value):
        calls.append(value)
        if value == 2:
            raise KeyboardInterrupt
        return {"accuracy": 10.0 * value}

    study = Study(path, ABOUT)
    for seed in (0, 1):
        study.measure({"seed": seed}, lambda s=seed: work(s))
    with pytest.raises(KeyboardInterrupt):
        study.measure({"seed": 2}, lambda: work(2))
    again = Study(path, ABOUT)
    for seed in (0, 1, 3):
        again.measure({"seed": seed}, lambda s=seed: work(s))
    assert calls == [0, 1, 2, 3]
    kept = json.loads(path.read_text())
    assert [row["accuracy"] for row in kept["rows"]] == [0.0, 10.0, 30.0]
    assert kept["environment"]["torch"]
    assert again.find(seed=3)[0]["accuracy"] == 30.0


def square(number):
    if number == 3:
        raise StiefelError("three is refused")
    if number == 5:
        time.sleep(1)  # still at it when another fails
    return {"square": number**2, "process": os.getpid()}


def tasks(*numbers):
    return [({"number": number}, partial(square, number)) for number in numbers]


def test_several_at_a_time_are_the_same_rows_and_an_error_loses_none(tmp_path):
    study = Study(tmp_path / "s.json", ABOUT)
    study.measure({"number": 1}, lambda: {"square": "kept"})
    threads = torch.get_num_threads()
    try:
        study.measure_all(tasks(1, 2, 4), jobs=2)
        assert [row["number"] for row in study.rows] == [1, 2, 4]
        with pytest.raises(StiefelError, match="three is refused"):
            study.measure_all(tasks(2, 3, 5, 6, 7), jobs=2)
    finally:
        torch.set_num_threads(threads)
    rows = {row["number"]: row for row in Study(tmp_path / "s.json", ABOUT).rows}
    squares = {number: row["square"] for number, row in rows.items()}
    assert squares == {1: "kept", 2: 4, 4: 16, 5: 25}  # nothing is begun after an error
    assert os.getpid() not in (rows[2]["process"], rows[4]["process"])
    assert rows[2]["seconds"] >= 0


def test_what_is_to_be_measured_again_stays_on_disk_until_it_is(tmp_path):
    study = Study(tmp_path / "s.json", ABOUT)
    for seed in (0, 1):
        study.measure({"seed": seed}, lambda: {"accuracy": 1.0})
    study.forget(seed=1)
    assert len(Study(tmp_path / "s.json", ABOUT).rows) == 2
    study.measure({"seed": 1}, lambda: {"accuracy": 2.0})
    kept = {row["seed"]: row["accuracy"] for row in Study(tmp_path / "s.json", ABOUT).rows}
    assert kept == {0: 1.0, 1: 2.0}


def test_rows_of_another_study_are_not_mixed_in(tmp_path):
    Study(tmp_path / "s.json", ABOUT).measure({"seed": 0}, lambda: {"accuracy": 1.0})
    with pytest.raises(StiefelError, match="another study"):
        Study(tmp_path / "s.json", {**ABOUT, "images": 4})


def test_a_spread_is_told_with_how_many_runs_it_rests_on():
    assert mean_sd([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert mean_sd([1.0, 2.0]) == "1.50 ± 0.71 (two)"
    assert mean_sd([1.0]) == "1.00 (one)"
    assert mean_sd([]) == "–"


def test_tables_are_markdown():
    table = markdown_table(["a", "b"], [["x", "1"], ["y", "2"]])
    assert table == "| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |\n"


def test_images_held_back_are_not_trained_on_and_the_others_change_every_epoch():
    data, plain = load_data("digits"), load_data("digits", augment=False)
    split = held_back(data, plain, 1000)
    assert len(split.train) == 1000
    assert len(split.train) + len(split.test) == len(data.train)
    seen = {x.numpy().tobytes() for x, _ in held_back(plain, plain, 1000).train}
    assert not any(x.numpy().tobytes() in seen for x, _ in split.test)
    epochs = []
    for epoch in (1, 2):
        split.train.set_epoch(epoch)
        epochs.append(split.train.batch(range(100))[0])
    assert not torch.equal(*epochs)


def test_globs_choose_rows_and_none_chooses_all():
    names = ["SSA, global", "SSA, layer-wise", "DFA"]
    assert matching(names, ()) == names
    assert matching(names, ("*wise", "D*")) == ["SSA, layer-wise", "DFA"]
