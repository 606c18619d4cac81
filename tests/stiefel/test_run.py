"""The whole road on real images: every step does its work, and an interrupted run goes on."""

import json
from types import SimpleNamespace

import onnxruntime
import pytest
import torch

from converter.checkpoints import load_any, read_metadata, save_dense
from converter.errors import StiefelError
from converter.factors import factored_layers
from converter.models import load
from stiefel import run as running
from stiefel.console import Console
from stiefel.recipe import Recipe
from stiefel.report import write
from trainers.data import load_data
from trainers.evaluate import evaluate

RECIPE = {
    "name": "short",
    "device": "cpu",
    "data": {"source": "digits"},
    "model": {"name": "zoo:digits"},
    "pretrain": {"epochs": 4},
    "convert": {"rank": "params=0.5", "calibrate_images": 100},
    "train": {"epochs": 2},
    "export": {},
    "bench": {"batches": [1, 4], "rounds": 3, "calls": 3, "seconds": 0.2},
}
STAGES = ("dense", "converted", "trained")
QUICK = RECIPE | {
    "data": {"source": "digits", "limit_train": 200, "limit_test": 60},
    "pretrain": {"epochs": 1},
    "convert": {"rank": "params=0.5", "calibrate": None},
    "train": {"epochs": 1},
    "bench": {"runtimes": ["torch"], "batches": [1], "rounds": 3, "calls": 1, "warmup": 1},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "short"
    return folder, running.run(Recipe.model_validate(RECIPE), folder, Console())


def test_the_folder_holds_all_that_was_promised(done):
    folder, report = done
    names = {path.name for path in folder.iterdir()}
    assert {f"{stage}.safetensors" for stage in STAGES} <= names
    assert {"dense.onnx", "small.onnx", "small.safetensors", "recipe.yaml"} <= names
    assert {"report.json", "report.md", "training.png", "comparison.png"} <= names
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    done_to_it = [
        entry["step"] for entry in read_metadata(folder / "trained.safetensors")["history"]
    ]
    assert done_to_it == ["convert", "train-local"]
    page = (folder / "report.md").read_text()
    assert "accuracy, test" in page
    assert "training.png" in page


def test_the_report_s_figures_are_those_of_the_files(done):
    folder, report = done
    for stage in STAGES:
        path = folder / f"{stage}.safetensors"
        model = load_any(path)
        data = load_data("digits", input=model.stiefel_spec.input)
        figures = report[stage]
        assert figures["accuracy"] == pytest.approx(evaluate(model, data.test).accuracy)
        assert figures["parameters"] == sum(p.numel() for p in model.parameters())
        assert figures["file_size_bytes"] == path.stat().st_size
        assert figures["macs"] > 0


def test_half_the_parameters_are_left_and_local_training_helps(done):
    _, report = done
    share = report["converted"]["parameters"] / report["dense"]["parameters"]
    assert 0.49 <= share <= 0.5
    assert report["dense"]["accuracy"] > 0.9
    assert report["trained"]["accuracy"] >= report["converted"]["accuracy"]


def test_onnx_runtime_gives_torch_s_output_on_the_test_images(done):
    folder, report = done
    assert report["export"]["onnx"]["max_abs_error"] < 1e-3
    model = load_any(folder / "trained.safetensors").eval()
    data = load_data("digits", input=model.stiefel_spec.input)
    x = torch.stack([data.test[k][0] for k in range(6)])
    session = onnxruntime.InferenceSession(
        folder / "small.onnx", providers=["CPUExecutionProvider"]
    )
    (name,) = (given.name for given in session.get_inputs())
    (found,) = session.run(None, {name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), atol=1e-4, rtol=1e-4)


def test_the_benchmark_has_a_row_for_each_model_runtime_and_batch(done):
    _, report = done
    places = {(r["model"], r["runtime"], r["batch"]) for r in report["bench"]}
    models, runtimes = ("dense", "factored"), ("torch", "onnxruntime")
    assert places == {(m, r, b) for m in models for r in runtimes for b in (1, 4)}
    for row in report["bench"]:
        assert 0 < row["latency_ms_p50"] <= row["latency_ms_p95"]
        expected = 1000 * row["batch"] / row["latency_ms_p50"]
        assert row["throughput_per_s"] == pytest.approx(expected, rel=1e-3)


def test_without_conversion_a_copy_is_trained_and_the_dense_model_stays_as_it_was(
    tmp_path, monkeypatch
):
    exported = {}

    def export(model, path, *, accuracy, **options):
        exported[path.name] = model, accuracy
        figures = {"max_abs_error": 0.0, "outputs_compared": 1}
        return SimpleNamespace(path=path, model_dump=lambda mode: figures)

    monkeypatch.setattr(running, "export_onnx", export)
    sections = {"convert": None, "train": QUICK["train"] | {"rule": {"name": "bp"}}}
    sections |= {"export": {"formats": ["onnx"]}, "bench": None}
    report = running.run(Recipe.model_validate(QUICK | sections), tmp_path / "run", Console())
    weights = []
    for stage, name in (("dense", "dense.onnx"), ("trained", "small.onnx")):
        model, accuracy = exported[name]
        kept = load_any(tmp_path / "run" / f"{stage}.safetensors").state_dict()
        torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)
        assert accuracy == report[stage]["accuracy"]
        weights.append(kept["features.0.weight"])
    assert not torch.equal(*weights)
    state = torch.load(tmp_path / "run" / "training" / "state.pt", weights_only=True)
    assert state["materials"]["teacher"] is None


@pytest.mark.parametrize("export", [None, {"formats": []}])
@pytest.mark.parametrize(("done", "skipped"), [("converted", "train"), ("trained", "convert")])
def test_what_is_not_exported_is_timed_from_the_run_s_own_checkpoints(
    export, done, skipped, tmp_path
):
    train = QUICK["train"] | {"rule": {"name": "bp"}}
    sections = {"pretrain": None, "train": train, "export": export, skipped: None}
    report = running.run(Recipe.model_validate(QUICK | sections), tmp_path / "run", Console())
    name = "factored" if done == "converted" else "trained"
    assert [row["model"] for row in report["bench"]] == ["dense", name]
    sizes = [report[stage]["file_size_bytes"] for stage in ("dense", done)]
    assert [row["file_size_bytes"] for row in report["bench"]] == sizes


def test_a_report_without_diagnostics_leaves_no_earlier_plot_of_them(done, tmp_path):
    (tmp_path / "diagnostics.png").touch()
    written = write(done[1], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}


def test_environment_and_recipe_are_in_the_report(done):
    _, report = done
    assert report["environment"]["seed"] == 0
    assert report["environment"]["torch"] == torch.__version__.split("+")[0]
    assert report["recipe"]["convert"]["scheme"] == "spatial"


def test_an_interrupted_run_resumed_ends_where_an_uninterrupted_one_does(
    done, tmp_path, monkeypatch
):
    _, whole = done
    recipe = Recipe.model_validate(RECIPE | {"export": None, "bench": None})
    real = running.train_local
    calls = []

    def interrupted(model, data, **options):
        calls.append(options)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, data, **options)

    monkeypatch.setattr(running, "train_local", interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.run(recipe, tmp_path / "run", Console())
    report = running.run(recipe, tmp_path / "run", Console(), resume=True)
    assert len(calls) == 3  # pretraining once, local training twice
    for stage in STAGES:
        assert report[stage]["accuracy"] == whole[stage]["accuracy"]
    assert factored_layers(load_any(tmp_path / "run" / "trained.safetensors"))


def test_a_run_that_failed_goes_on_with_the_recipe_corrected_there(tmp_path, monkeypatch):
    recipe = QUICK | {"train": None, "export": None, "bench": None}
    calls, real = [], running.train_local

    def counted(*arguments, **options):
        calls.append(arguments)
        return real(*arguments, **options)

    def failing(*arguments, **options):
        raise StiefelError("no plan was fast enough")

    monkeypatch.setattr(running, "train_local", counted)
    with monkeypatch.context() as patch:
        patch.setattr(running, "make_plan", failing)
        with pytest.raises(StiefelError, match="fast enough"):
            running.run(Recipe.model_validate(recipe), tmp_path / "run", Console())
    corrected = Recipe.model_validate(recipe | {"convert": {"rank": "8", "calibrate": None}})
    report = running.run(corrected, tmp_path / "run", Console(), resume=True)
    assert len(calls) == 1
    assert report["plan"]["policy"] == report["recipe"]["convert"]["rank"] == "8"


def test_a_folder_with_something_in_it_is_left_alone(done):
    folder, _ = done
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(StiefelError, match="is not empty"):
        running.run(Recipe.model_validate(RECIPE), folder, Console())
    other = Recipe.model_validate(RECIPE | {"seed": 1})
    with pytest.raises(StiefelError, match="another recipe"):
        running.run(other, folder, Console(), resume=True)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    recipe = Recipe.model_validate(RECIPE | {"model": {"name": "zoo:digist"}})
    with pytest.raises(StiefelError, match="digits"):
        running.run(recipe, tmp_path / "run", Console())
    assert not (tmp_path / "run").exists()


def test_a_model_whose_output_is_not_finite_ends_the_run_by_the_stage_s_name(tmp_path):
    model = load("zoo:digits")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    save_dense(model, tmp_path / "nan.safetensors")
    sections = {"model": {"checkpoint": str(tmp_path / "nan.safetensors")}, "data": QUICK["data"]}
    with pytest.raises(StiefelError, match="^dense: the model's output isn't finite; no figure"):
        running.run(Recipe.model_validate(sections), tmp_path / "run", Console())


def test_the_run_tells_of_settings_that_change_nothing(tmp_path, capsys):
    recipe = QUICK | {"train": {"epochs": 1, "rule": {"name": "ssa", "storage": "recomputed"}}}
    sections = {key: value for key, value in recipe.items() if key not in ("export", "bench")}
    running.run(Recipe.model_validate(sections), tmp_path / "run", Console())
    assert "note: storage recomputed is for" in capsys.readouterr().err
