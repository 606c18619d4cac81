"""What a person types and sees: every command does its work or says in one line why not."""

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from converter import convert as factoring
from converter.checkpoints import load_any, save_dense
from converter.errors import StiefelError
from converter.factors import factored_layers
from converter.models import load, spec_of
from export import parity
from export.bench_report import BenchReport
from export.safetensors import read_metadata
from stiefel.cli import main
from stiefel.plots import draw_spectra
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


def test_a_compact_file_is_no_further_compacted(small, tmp_path):
    compact = tmp_path / "compact.safetensors"
    assert stiefel("export", small, "-o", compact).exit_code == 0
    result = stiefel("export", compact, "-o", tmp_path / "again.safetensors")
    assert result.exit_code == 1
    assert "is a compact export already: copy it" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [compact.name]


@pytest.mark.parametrize(
    "command", [("convert",), ("convert", "--model", "zoo:digits", "--checkpoint"), ("export",)]
)
def test_a_checkpoint_is_not_written_over_while_it_is_read(command, small, tmp_path):
    source = tmp_path / "a.safetensors"
    source.write_bytes(small.read_bytes())
    result = stiefel(*command, source, "-o", tmp_path / "." / "a.safetensors")
    assert result.exit_code == 2
    assert "is the checkpoint that is read: name another file" in result.stderr
    assert source.read_bytes() == small.read_bytes()


@pytest.mark.parametrize("as_teacher", [False, True])
def test_training_does_not_begin_with_what_it_would_replace(as_teacher, small, tmp_path):
    held = tmp_path / "a.run" / "best.safetensors"
    held.parent.mkdir()
    held.write_bytes(small.read_bytes())
    begin, rest = (small, ("--teacher", held)) if as_teacher else (held, ())
    words = ("train-local", begin, "--data", "digits", "-o", tmp_path / "a.safetensors")
    result = stiefel(*words, *rest)
    assert result.exit_code == 2
    assert f"{held} is one that this run would replace: name another --out" in result.stderr
    assert held.read_bytes() == small.read_bytes()


def test_a_rule_without_use_for_a_teacher_is_given_none(small, tmp_path):
    words = ("train-local", small, "--data", "digits", "--rule", "bp", "--teacher", small)
    result = stiefel(*words, "-o", tmp_path / "a.safetensors")
    assert result.exit_code == 2
    assert "--teacher is not for --rule bp" in result.stderr


def test_training_does_not_write_over_what_it_began_with(small, tmp_path):
    source = tmp_path / "a.safetensors"
    source.write_bytes(small.read_bytes())
    result = stiefel("train-local", source, "--data", "digits", "-o", source)
    assert result.exit_code == 2
    assert "name another file" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_model_whose_output_is_not_finite_is_not_evaluated(tmp_path):
    model = load("zoo:digits")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    save_dense(model, tmp_path / "nan.safetensors")
    result = stiefel(
        *("evaluate", tmp_path / "nan.safetensors", "--data", "digits", "--limit-test", 20),
        *("--json", tmp_path / "nan.json"),
    )
    assert result.exit_code == 1
    assert "the model's output isn't finite" in result.stderr
    assert not (tmp_path / "nan.json").exists()


def test_doctor_tells_versions_and_providers(tmp_path):
    result = stiefel("doctor", "--json", tmp_path / "doctor.json")
    assert result.exit_code == 0
    assert torch.__version__.split("+")[0] in result.stdout
    assert json.loads((tmp_path / "doctor.json").read_text())["providers"]["cpu"] == "loads"


BUILDS = (
    *(("--model-arg", "a=1"), ("--weights", "DEFAULT"), ("--input-mean", "0.5")),
    *(("--rename", "a=b"), ("--variant", "ema")),
)
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")


@pytest.mark.parametrize(
    ("status", "arguments", "words"),
    [
        (1, ("convert", "--model", "zoo:resnet23", "-o", "OUT"), "did you mean"),
        (1, ("convert", "--model", "zoo:mlp", "--checkpoint", "gone.pt", "-o", "OUT"), "gone.pt"),
        (1, ("convert", "--model", "zoo:mlp", "--checkpoint", "TEXT", "-o", "OUT"), "TEXT"),
        (1, ("convert", "--model", "zoo:mlp", "--checkpoint", "DENSE", "-o", "OUT"), "missing"),
        (1, ("convert", "DENSE", "--rank", "0", "-o", "OUT"), "rank '0'"),
        (1, ("convert", "DENSE", "--rank", "9999", "-o", "OUT"), "9999"),
        (1, ("convert", "DENSE", "--rank", "params=0.001", "-o", "OUT"), "out of reach"),
        (1, ("convert", "DENSE", "--layer", "nothing.*=8", "-o", "OUT"), "nothing.*"),
        (1, ("convert", "DENSE", "-o", "no/such/folder/x.safetensors"), "no/such/folder"),
        (2, ("convert", "DENSE"), "-o"),
        (2, ("convert", "-o", "OUT"), "name a model"),
        (2, ("convert", "DENSE", "--scheme", "diagonal", "-o", "OUT"), "--scheme"),
        (2, ("train-local", "SMALL", "--data", "digits", "--epochs", "0", "-o", "OUT"), "--epochs"),
        (
            2,
            (
                "train-local",
                "SMALL",
                "--data",
                "digits",
                "--rule",
                "dfa",
                "--beta",
                "1",
                "-o",
                "OUT",
            ),
            "--beta is not for --rule dfa",
        ),
        *((2, ("inspect", "DENSE", *said), f"{said[0]} goes with --model NAME") for said in BUILDS),
        *((2, ("convert", "DENSE", "--dry-run", *said), f"{said[0]} goes with") for said in BUILDS),
        (2, ("evaluate", "DENSE", "--data", "digits", *BUILDS[0]), "goes with --model NAME"),
        (2, ("inspect", "zoo:mlp", "--rename", "a=b"), "--rename goes with a checkpoint"),
        (2, ("evaluate", "DENSE", "--data", "digits", "--augment"), "--augment"),
        (2, ("evaluate", "DENSE", "--data", "digits", "--limit-train", "9"), "--limit-train"),
        *(
            (2, ("convert", "DENSE", "--dry-run", "--plan", "x", *said), f"{said[0]} is for making")
            for said in (("--rank", "8"), ("--layer", "*=8"), ("--scheme", "auto"), ("--batch", 2))
        ),
        *(
            (2, ("convert", "DENSE", "--dry-run", *said), f"{said[0]} goes with --calibrate DATA")
            for said in (("--calibrate-images", 9), ("--calibration-refine-steps", 9))
        ),
        (2, ("inspect", "DENSE", "--cuts", "--plot", "x.png"), "--plot is not for --cuts"),
        (1, ("train-local", "SMALL", "--data", "digtis", "-o", "OUT"), "digits"),
        (1, ("train-local", "DENSE", "--data", "digits", "-o", "OUT"), "factored"),
        (1, ("train-local", "SMALL", "--data", "fake:3x8x8", "-o", "OUT"), "channel"),
        (2, ("convert", "DENSE", "-o", "x.pt"), "end the name in .safetensors"),
        (2, ("train-local", "SMALL", "--data", "digits", "-o", "x.pth"), "end the name in"),
        (2, ("export", "SMALL", "-o", "x.tflite"), ".onnx or .safetensors"),
        (2, ("export", "SMALL", "-o", "OUT", "--opset", "18"), "--opset is for .onnx files"),
        (2, ("export", "SMALL", "-o", "OUT", "--data", "digits"), "--data is for .onnx files"),
        (1, ("export", ".", "-o", "OUT"), "is a folder"),
        (1, ("bench", "."), "is a folder"),
        (1, ("export", "zoo:resnet20x", "-o", "OUT"), "resnet20"),
        (1, ("bench", "TEXT"), "TEXT"),
        (1, ("run", "gone.yaml"), "gone.yaml"),
        pytest.param(
            *(1, ("evaluate", "SMALL", "--data", "digits", "--device", "cuda"), "cuda"),
            marks=NO_CUDA,
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    status, arguments, words, dense, small, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "TEXT.safetensors"
    text.write_text("this is no model")
    places = {"DENSE": dense, "SMALL": small, "TEXT": text, "OUT": tmp_path / "out.safetensors"}
    result = stiefel(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == status, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    if status == 1:
        assert len(result.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [text.name]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    result = stiefel("run", RECIPES / "digits.yaml", "--out", blocked / "run")
    assert result.exit_code == 1
    assert str(blocked) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


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


def test_where_no_file_can_be_written_is_told_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr("stiefel.cli.build", lambda *_, **__: pytest.fail("work began"))
    result = CliRunner().invoke(
        main, ["convert", "--model", "zoo:digits", "-o", str(tmp_path / "no" / "x.safetensors")]
    )
    assert result.exit_code == 1
    assert "folder" in result.stderr
    assert "does not exist" in result.stderr


@pytest.mark.parametrize(
    ("work", "command"),
    [("bench", ("bench", "zoo:mlp")), ("build", ("inspect", "zoo:mlp"))],
)
def test_what_a_picture_may_end_in_is_told_before_the_work(work, command, monkeypatch):
    monkeypatch.setattr(f"stiefel.cli.{work}", lambda *_, **__: pytest.fail("work began"))
    result = stiefel(*command, "--plot", "b.foo")
    assert result.exit_code == 2
    assert "b.foo: end the name in .png or" in result.stderr


def test_figures_are_kept_where_they_cannot_be_drawn(monkeypatch, tmp_path):
    def fail(*_):
        raise StiefelError("no picture")

    report = BenchReport(rows=(), ratios=(), ceilings=(), environment={})
    monkeypatch.setattr("stiefel.cli.bench", lambda *_, **__: report)
    monkeypatch.setattr("stiefel.cli.draw_bench", fail)
    monkeypatch.setattr("stiefel.cli.draw_spectra", fail)
    json_file, markdown = tmp_path / "b.json", tmp_path / "b.md"
    drawn = ("--plot", tmp_path / "b.png", "--json")
    result = stiefel("bench", "zoo:mlp", "--markdown", markdown, *drawn, json_file)
    assert (result.exit_code, result.stderr) == (1, "stiefel: no picture\n")
    assert json.loads(json_file.read_text())["rows"] == []
    assert markdown.exists()
    assert stiefel("inspect", "zoo:mlp", *drawn, tmp_path / "i.json").exit_code == 1
    assert json.loads((tmp_path / "i.json").read_text())["layers"]


def test_a_model_without_spectra_has_no_picture_of_them(tmp_path):
    with pytest.raises(StiefelError, match="no spectra"):
        draw_spectra({}, {}, tmp_path / "none.png")
