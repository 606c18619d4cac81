"""What a person types and sees: every command does its work."""

import json
import os
import subprocess
import sys

import pytest
import torch

from converter import convert as factoring
from converter.checkpoints import load_any, save_dense
from converter.factors import factored_layers
from converter.models import load, spec_of
from export import parity
from export.safetensors import read_metadata
from tests.stiefel.command import RECIPES, stiefel


def test_convert_prints_the_plan_and_writes_a_factored_checkpoint(dense, tmp_path):
    out, plan = tmp_path / "small.safetensors", tmp_path / "plan.json"
    result = stiefel(
        *("convert", dense, "--rank", "0.25", "--layer", "features.3=keep"),
        *("--plan-out", plan, "-o", out, "--json", tmp_path / "result.json"),
    )
    assert result.exit_code == 0, result.output
    assert "Rank plan" in result.stdout
    assert "kept by request: features.3" in result.stdout
    layers = factored_layers(load_any(out))
    assert layers
    assert "features.3" not in layers
    again = stiefel("convert", dense, "--plan", plan, "-o", tmp_path / "again.safetensors")
    assert again.exit_code == 0, again.output
    ranks = {name: layer.rank for name, layer in layers.items()}
    found = factored_layers(load_any(tmp_path / "again.safetensors"))
    assert {name: layer.rank for name, layer in found.items()} == ranks
    assert json.loads((tmp_path / "result.json").read_text())["layers"]


def test_one_input_option_leaves_the_rest_of_the_models_input_alone(tmp_path):
    out = tmp_path / "small.safetensors"
    named = ("--input-interpolation", "bicubic", "-o", out)
    result = stiefel("convert", "--model", "zoo:resnet20", "--rank", "0.25", *named)
    assert result.exit_code == 0, result.output
    own = spec_of(load("zoo:resnet20")).input
    assert spec_of(load_any(out)).input == own.model_copy(update={"interpolation": "bicubic"})
    assert "[default: 3,224,224]" not in stiefel("inspect", "--help").output


def test_an_edited_plan_is_shown_and_kept_as_what_it_has_become(dense, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "small.safetensors"
    assert stiefel("convert", dense, "--rank", "8", "--dry-run", "--plan-out", plan).exit_code == 0
    data = json.loads(plan.read_text())
    for layer in data["layers"]:
        layer["scheme"] = layer["scheme"] and "channel"
    data["layers"][1]["rank"] = 2
    plan.write_text(json.dumps(data | {"dense_parameters": 0}))
    asked = ("--rank", "8", "--layer", "features.3=2", "--scheme", "channel")
    result = stiefel("convert", dense, "--plan", plan, "--dry-run", "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    stiefel("convert", dense, *asked, "--dry-run", "--json", tmp_path / "b.json")
    found, wanted = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert found == wanted
    assert stiefel("convert", dense, "--plan", plan, "-o", out).exit_code == 0
    assert load_any(out).stiefel_plan.model_dump(mode="json") == wanted
    result = stiefel("convert", "zoo:mlp", "--plan", plan, "--dry-run")
    assert result.exit_code == 1
    assert "is not in the model" in result.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_checkpoints_of_another_dtype_are_looked_at_and_converted(dense, tmp_path, dtype):
    other, out = tmp_path / "other.safetensors", tmp_path / "small.safetensors"
    save_dense(load_any(dense).to(dtype), other)
    for command in (
        ("inspect", other),
        ("inspect", other, "--cuts"),
        ("convert", other, "--rank", "params=0.5", "-o", out),
        ("inspect", out),
    ):
        result = stiefel(*command)
        assert result.exit_code == 0, result.output
    assert {p.dtype for p in load_any(out).parameters()} == {dtype}


def test_a_dry_run_writes_nothing(dense, tmp_path):
    before = sorted(dense.parent.iterdir())
    assert stiefel("convert", dense, "--dry-run").exit_code == 0
    result = stiefel("run", RECIPES / "digits.yaml", "--dry-run", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "rank: params=0.5" in result.stdout
    assert "Rank plan" in result.stdout
    assert sorted(dense.parent.iterdir()) == before
    assert not (tmp_path / "run").exists()


def test_a_latency_budget_is_measured_with_the_batch_that_is_asked_for(dense, monkeypatch):
    seen = []

    def planned(model, policy, *, example, **rest):
        seen.append(len(example))
        return real(model, 0.5, example=example)

    real = factoring.plan
    monkeypatch.setattr(factoring, "plan", planned)
    for options in ((), ("--batch", 6)):
        result = stiefel("convert", dense, "--rank", "latency=0.5", *options, "--dry-run")
        assert result.exit_code == 0, result.output
    assert seen == [1, 6]


def test_training_tells_of_settings_that_change_nothing(small, tmp_path):
    result = stiefel(
        *("train-local", small, "--data", "digits", "--limit-train", 200, "--epochs", 1),
        *("--device", "cpu", "--overlap", 2, "-o", tmp_path / "trained.safetensors"),
    )
    assert result.exit_code == 0, result.output
    assert "note: overlap 2 is for one GPU" in result.stderr


def test_train_export_evaluate_inspect_and_bench_take_on_what_convert_wrote(dense, small, tmp_path):
    trained, onnx = tmp_path / "trained.safetensors", tmp_path / "small.onnx"
    (tmp_path / "trained.run").mkdir()
    stale = tmp_path / "trained.run" / "diagnostics.png"
    stale.touch()
    result = stiefel(
        *("train-local", small, "--data", "digits", "--limit-train", 200, "--epochs", 1),
        *("--teacher", dense, "-o", trained, "--json", tmp_path / "history.json"),
    )
    assert result.exit_code == 0, result.output
    assert not stale.exists(), "an earlier run's plot, when this one had no diagnostics"
    history = json.loads((tmp_path / "history.json").read_text())
    assert len(history["records"]) == 1
    assert f"Test accuracy {100 * history['best_accuracy']:.2f} %. Wrote" in result.stdout

    result = stiefel("evaluate", trained, "--data", "digits", "--json", tmp_path / "accuracy.json")
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "accuracy.json").read_text())
    assert measured["accuracy"] == history["records"][0]["test_accuracy"]
    assert f"{100 * measured['accuracy']:.2f} %" in result.stdout

    report = tmp_path / "export.json"
    result = stiefel("export", trained, "-o", onnx, "--data", "digits", "--json", report)
    assert result.exit_code == 0, result.output
    assert "Largest difference from torch" in result.stdout
    # Ten classes of four random images and eight real ones.
    assert json.loads(report.read_text())["outputs_compared"] == 120
    compact = tmp_path / "compact.safetensors"
    result = stiefel("export", trained, "-o", compact, "--precision", "bf16")
    assert result.exit_code == 0, result.output
    facts = read_metadata(compact)
    assert float(facts["accuracy"]) == measured["accuracy"]
    assert facts["precision"] == "bf16"

    result = stiefel("inspect", trained, "--plot", tmp_path / "spectra.png")
    assert result.exit_code == 0, result.output
    assert "factored Conv2d" in result.stdout
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    result = stiefel("inspect", trained, "--cuts")
    assert result.exit_code == 0, result.output
    assert "local blocks" in result.stdout

    result = stiefel(
        *("bench", dense, trained, onnx, "--batches", "1", "--rounds", 3, "--calls", 2),
        *("--seconds", "0.1", "--plot", tmp_path / "bench.png", "--json", tmp_path / "b.json"),
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {row["runtime"] for row in rows} == {"torch", "onnxruntime"}
    assert (tmp_path / "bench.png").exists()


def test_a_dense_model_with_weights_of_its_own_is_exported_as_factored_ones_are(tmp_path):
    torch.manual_seed(1)
    weights, onnx = tmp_path / "dense.pth", tmp_path / "dense.onnx"
    model = load("zoo:mlp", args={"width": 32})
    torch.save(model.state_dict(), weights)
    result = stiefel("export", weights, "-o", onnx)
    assert result.exit_code == 1
    assert "export take --model" in result.stderr
    named = ("--model", "zoo:mlp", "--model-arg", "width=32")
    result = stiefel("export", weights, *named, "-o", onnx)
    assert result.exit_code == 0, result.output
    x = torch.randn(2, *model.stiefel_spec.input.shape)
    assert parity.outputs_differ(model, onnx, [x]).relative < 1e-5


def test_a_compact_file_is_exported_further(small, tmp_path):
    compact = tmp_path / "compact.safetensors"
    assert stiefel("export", small, "-o", compact).exit_code == 0
    result = stiefel("export", compact, "-o", tmp_path / "small.onnx")
    assert result.exit_code == 0, result.output


def test_doctor_tells_versions_and_providers(tmp_path):
    result = stiefel("doctor", "--json", tmp_path / "doctor.json")
    assert result.exit_code == 0
    assert torch.__version__.split("+")[0] in result.stdout
    assert json.loads((tmp_path / "doctor.json").read_text())["providers"]["cpu"] == "loads"


@pytest.mark.slow
def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "stiefel", "--version"],
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )
    assert done.stdout.startswith("stiefel")
