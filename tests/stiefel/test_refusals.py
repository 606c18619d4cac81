"""What a command cannot do it says in one line, and writes and loses nothing."""

import json

import pytest
import torch
from click.testing import CliRunner

from converter.checkpoints import save_dense
from converter.errors import StiefelError
from converter.models import load
from export.bench_report import BenchReport
from stiefel.cli import main
from stiefel.plots import draw_spectra
from tests.stiefel.command import RECIPES, stiefel


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
