"""The road of recipes/resnet32.yaml on a published network and a few hundred real photographs."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from converter.checkpoints import load_any
from converter.factors import factored_layers
from stiefel.cli import main
from trainers.data import load_data
from trainers.evaluate import evaluate

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "resnet32.yaml"


def command(*words) -> None:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def checkpoint(shared_data) -> Path:
    file = shared_data / "resnet32-d509ac18.th"
    if not file.is_file():
        pytest.skip(f"{file} not at hand")
    return file


@pytest.fixture(scope="module")
def road(checkpoint, cifar_folder, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("resnet32") / "run"
    changes = {
        "data.source": f"imagefolder:{cifar_folder}",
        "model.checkpoint": checkpoint,
        "device": "cpu",
        "convert.calibrate_images": 100,
        "convert.calibration.refine_steps": 20,
        "train.batch_size": 50,
        "train.lr": 0.0005,
        "bench.batches": "[1]",
        "bench.rounds": 3,
        "bench.calls": 3,
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    command("run", RECIPE, "--out", folder, *sets)
    return folder, json.loads((folder / "report.json").read_text())


def test_the_published_network_keeps_most_of_its_accuracy_at_half_its_parameters(road):
    _, report = road
    assert report["dense"]["parameters"] == 464_154
    assert 0.49 <= report["converted"]["parameters"] / 464_154 <= 0.5
    # 400 photographs: two points is one standard error.
    assert report["dense"]["accuracy"] > 0.75
    assert report["converted"]["accuracy"] > report["dense"]["accuracy"] - 0.1
    assert report["trained"]["accuracy"] > report["dense"]["accuracy"] - 0.1


def test_the_checkpoint_s_own_normalisation_is_used(checkpoint, cifar_folder):
    command_line = ["--model", "zoo:resnet32", "--checkpoint", checkpoint]
    model = load_any(checkpoint, model="zoo:resnet32")
    spec = model.stiefel_spec.input
    plain = spec.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3})
    source = f"imagefolder:{cifar_folder}"
    own, other = (evaluate(model, load_data(source, input=s).test).accuracy for s in (spec, plain))
    assert own > other + 0.1
    result = CliRunner().invoke(
        main, ["evaluate", *map(str, command_line), "--data", source, "--device", "cpu"]
    )
    assert f"{100 * own:.2f} %" in result.output


def test_half_the_network_reloads_exports_and_is_timed(road):
    folder, report = road
    small = load_any(folder / "trained.safetensors")
    assert len(factored_layers(small)) >= 20
    with torch.no_grad():
        assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert report["export"]["onnx"]["max_abs_error"] < 1e-2
    assert {row["model"] for row in report["bench"]} == {"dense", "factored"}
    assert all(row["latency_ms_p50"] > 0 for row in report["bench"])


def test_the_published_file_itself_is_a_teacher(road, checkpoint, cifar_folder, tmp_path):
    folder, _ = road
    small, output = folder / "converted.safetensors", tmp_path / "trained.safetensors"
    source = ("--data", f"imagefolder:{cifar_folder}", "--limit-train", 32, "--limit-test", 10)
    limits = ("--epochs", 1, "--batch-size", 16, "--lr", 1e-4, "--device", "cpu")
    command("train-local", small, "--teacher", checkpoint, *source, *limits, "-o", output)
    before, after = load_any(small), load_any(output)
    assert not torch.equal(before.layer1[0].conv1.U, after.layer1[0].conv1.U)
