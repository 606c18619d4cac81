"""The commands: each parses its line, calls one function, prints what came of it."""

import sys
from pathlib import Path
from typing import Any

import click
import torch

import stiefel
from converter import convert as factoring
from converter import inspect as inspecting
from converter.checkpoints import load_any, save_factored
from converter.errors import StiefelError
from converter.files import write_text
from export.bench import BenchSettings, bench
from export.doctor import doctor
from export.onnx import OnnxSettings, export_onnx
from export.safetensors import SafetensorsSettings, export_safetensors, is_compact, open_model
from stiefel import report as rendering
from stiefel import tables
from stiefel.console import Console
from stiefel.inputs import (
    FILE,
    NEW_CHECKPOINT,
    NEW_FILE,
    NEW_PLOT,
    check_apart,
    check_not_replaced,
    data_options,
    data_section,
    device_option,
    json_option,
    model_options,
    model_section,
    seed_option,
    write_json,
)
from stiefel.materials import (
    build,
    calibration_images,
    example_of,
    load_teacher,
    make_plan,
    open_data,
)
from stiefel.options import collect, given, settings_options
from stiefel.plots import draw_bench, draw_diagnostics, draw_spectra
from stiefel.recipe import (
    ConvertSection,
    DataSection,
    load_recipe,
    resolved,
)
from stiefel.run import dry_run, run
from stiefel.run_folder import STATE, default_folder, resume_command
from trainers.cuts import CutSettings, describe_cuts
from trainers.data import images
from trainers.device import resolve_device
from trainers.distributed import is_main_process, process_count
from trainers.evaluate import evaluate
from trainers.rank_schedule import look, shortfall
from trainers.rules import BP, DFA, SSA
from trainers.rules.idle import idle
from trainers.trainer import TrainSettings, train_local

RULES = {"ssa": SSA, "dfa": DFA, "bp": BP}
console = Console()


class Commands(click.Group):
    """Turns what a user can put right into one line and the promised exit status."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except StiefelError as error:
            print(f"stiefel: {error}", file=sys.stderr)
            context.exit(1)
        except KeyboardInterrupt:
            print("stiefel: interrupted; what was finished is kept", file=sys.stderr)
            context.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(stiefel.__version__, prog_name="stiefel")
def main() -> None:
    """Factor dense PyTorch networks, train them locally, export them compact."""


@main.command("run")
@click.argument("recipe_file", metavar="RECIPE", type=FILE)
@click.option("--out", type=FILE, help="run folder  [default: runs/NAME]")
@click.option("--set", "changes", multiple=True, metavar="SECTION.KEY=VALUE", help="change a key")
@click.option("--resume", is_flag=True, help="go on with an interrupted run in --out")
@click.option("--dry-run", "dry", is_flag=True, help="print recipe and plan, touch no file")
def run_command(
    recipe_file: Path, out: Path | None, changes: tuple[str, ...], resume: bool, dry: bool
) -> None:
    """Carry out a RECIPE: build, convert, train, export, bench, report."""
    recipe = load_recipe(recipe_file, changes)
    if dry:
        console.show(tables.as_yaml(resolved(recipe)))
        if plan := dry_run(recipe):
            console.show(tables.plan_table(plan))
        return
    if resume and out is None:
        raise click.UsageError("--resume needs the run folder: --out DIR")
    folder = out or default_folder(recipe)
    try:
        report = run(recipe, folder, console, resume=resume)
    except KeyboardInterrupt:
        if (folder / STATE).is_file():
            console.note(f"go on with: {resume_command(recipe_file, changes, folder)}")
        raise
    console.show(rendering.table(report))
    for line in rendering.closing_lines(report):
        console.show(line)
    console.show(f"Everything is in {folder}/; begin with report.md.")


@main.command()
@model_options
@settings_options(ConvertSection, exclude=("layers", "calibrate"))
@click.option("--layer", "layers", multiple=True, metavar="GLOB=RANK|keep", help="an exception")
@click.option("--calibrate", metavar="DATA", help="a data source whose training images calibrate")
@click.option("--plan", "plan_file", type=FILE, help="use this plan, written by --plan-out")
@click.option("--plan-out", type=NEW_FILE, help="write the plan as JSON, to read or edit")
@click.option("--dry-run", "dry", is_flag=True, help="print the plan, write no model")
@click.option("--output", "-o", type=NEW_CHECKPOINT, help="the factored checkpoint to write")
@device_option
@seed_option
@json_option
def convert(**values: Any) -> None:
    """Factor a dense model (or a factored one further) at chosen ranks."""
    output, dry, seed = values.pop("output"), values.pop("dry"), values.pop("seed")
    if output is None and not dry:
        raise click.UsageError("name the file to write: -o FILE.safetensors (or --dry-run)")
    _refuse_idle(values)
    source = model_section(values)
    check_apart(output, source.checkpoint)
    torch.manual_seed(seed)  # a model without a checkpoint is drawn
    model = build(source, note=console.note)
    layers = dict(_layer_exception(text) for text in values.pop("layers"))
    section = collect(ConvertSection, values, layers=layers, calibrate=values.pop("calibrate"))
    calibration = calibration_images(section, model, None, seed=seed)
    device = resolve_device(values["device"])
    with console.progress("convert") as progress:
        if values["plan_file"]:
            plan = factoring.revise(
                model,
                tables.read_plan(values["plan_file"]),
                example=example_of(model),
                calibration=calibration,
                settings=section.calibration,
                device=device,
                progress=progress,
            )
        else:
            plan = make_plan(model, section, calibration, device=device, progress=progress)
        small = None
        if not dry:
            small = factoring.convert(
                model,
                plan,
                calibration=calibration,
                settings=section.calibration,
                device=device,
                progress=progress,
            )
    console.show(tables.plan_table(plan))
    if values["plan_out"]:
        write_text(values["plan_out"], plan.to_json())
    if small is not None:
        save_factored(small, output, history={"step": "convert", "policy": plan.policy})
        console.show(f"Wrote {output} ({tables.file_size(output)}).")
    write_json(values["json_file"], plan)


@main.command("train-local")
@click.argument("path", type=FILE)
@data_options()
@click.option("--rule", type=click.Choice([*RULES]), default="ssa", show_default=True)
@click.option("--teacher", type=FILE, help="checkpoint of the dense original, for distillation")
@settings_options(TrainSettings, SSA, DFA, BP)
@click.option("--resume", is_flag=True, help="go on with an interrupted training in --out")
@click.option("--out", type=FILE, help="folder for log and checkpoints  [default: OUTPUT as .run]")
@click.option(
    "--output", "-o", type=NEW_CHECKPOINT, required=True, help="the trained checkpoint to write"
)
@json_option
def train_command(path: Path, rule: str, **values: Any) -> None:
    """Train a factored model with local, SVD-structured feedback."""
    check_apart(values["output"], path)
    output = values["output"]
    out = values["out"] or output.with_suffix(".run")
    for source in () if values["resume"] else (path, values["teacher"]):
        check_not_replaced(out, source)
    model = load_any(path)
    settings = collect(TrainSettings, values)
    chosen = collect(RULES[rule], values)
    own = given(RULES[rule], values)
    if unused := [o for other in RULES.values() for o in given(other, values) if o not in own]:
        raise click.UsageError(f"{unused[0]} is not for --rule {rule}")
    if values["teacher"] and rule != "ssa":
        raise click.UsageError(f"--teacher is not for --rule {rule}")
    data = open_data(data_section(values), model, seed=settings.seed)
    teacher = values["teacher"] and load_teacher(values["teacher"], model, console.note)
    if is_main_process():
        for remark in idle(chosen, resolve_device(settings.device), process_count()):
            console.note(remark)
    with console.training("train") as progress:
        history = train_local(
            model,
            data,
            rule=chosen,
            settings=settings,
            teacher=teacher,
            out=out,
            resume=values["resume"],
            progress=progress,
        )
    if history.interrupted:
        console.note("go on with the same command and --resume")
        raise KeyboardInterrupt
    if is_main_process():
        done = {"step": "train-local", "rule": rule}
        done["accuracy"] = last = history.records[-1]["test_accuracy"]
        save_factored(model, output, history=done)
        draw_diagnostics(history.diagnostics, out / "diagnostics.png")
        best = f"{100 * history.best_accuracy:.2f} %, in {out / 'best.safetensors'}"
        if missed := shortfall(settings.ranks, look(model)):
            console.note(missed)
        better = f" (best: {best})" if history.best_accuracy > last else ""
        console.show(f"Test accuracy {100 * last:.2f} %{better}. Wrote {output}.")
    write_json(values["json_file"], history)


@main.command()
@model_options
@click.option("--output", "-o", type=NEW_FILE, required=True, help="FILE.onnx or FILE.safetensors")
@click.option("--data", help="prove the export on real images of this data too")
@settings_options(SafetensorsSettings, OnnxSettings)
@json_option
def export(output: Path, data: str | None, json_file: Path | None, **values: Any) -> None:
    """Write a model, factored or dense, for deployment; the ending says the format."""
    if output.suffix not in (".onnx", ".safetensors"):
        raise click.UsageError(f"-o {output}: end the name in .onnx or .safetensors")
    section = model_section(values)
    check_apart(output, section.checkpoint)
    compact = section.name is None and is_compact(section.checkpoint)
    model = open_model(section.checkpoint) if compact else build(section, note=console.note)
    known = (getattr(model, "stiefel_history", None) or [{}])[-1].get("accuracy")
    if output.suffix == ".safetensors":
        if compact:
            raise StiefelError(f"{section.checkpoint} is a compact export already: copy it")
        unused = [option for option in given(OnnxSettings, values) if option != "--precision"]
        if unused := unused + ["--data"] * bool(data):
            raise click.UsageError(f"{unused[0]} is for .onnx files")
        settings = collect(SafetensorsSettings, values)
        result = export_safetensors(model, output, settings=settings, accuracy=known)
    else:
        settings, real = collect(OnnxSettings, values), None
        if data:
            section = DataSection(source=data, augment=False)
            real = images(open_data(section, model, seed=0).test, 8, 0)
        with console.status("export, then compare with torch"):
            result = export_onnx(
                model,
                output,
                example=example_of(model),
                inputs=real,
                settings=settings,
                accuracy=known,
            )
    console.show(tables.export_line(result))
    write_json(json_file, result)


@main.command("bench")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@settings_options(BenchSettings)
@click.option("--plot", type=NEW_PLOT, help="draw latency against batch")
@click.option("--markdown", type=NEW_FILE, help="write the tables as Markdown")
@json_option
def bench_command(
    models: tuple[str, ...],
    plot: Path | None,
    markdown: Path | None,
    json_file: Path | None,
    **values: Any,
) -> None:
    """Time MODELs side by side: ONNX files, checkpoints or torchvision:NAME."""
    settings = collect(BenchSettings, values)
    with console.progress("bench") as progress:
        result = bench(models, settings, progress=progress)
    console.show(tables.bench_table(result))
    console.show(tables.resources_table(result))
    for ratio in result.ratios:
        console.show(rendering.sentence(ratio.model_dump()))
    write_json(json_file, result)
    if markdown:
        write_text(markdown, result.markdown())
    if plot:
        draw_bench(result.rows, plot)


@main.command("evaluate")
@model_options
@data_options("augment", "limit_train")
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32")
@device_option
@seed_option
@json_option
def evaluate_command(**values: Any) -> None:
    """Measure the accuracy of a checkpoint, or of a model with --checkpoint."""
    model = build(model_section(values), note=console.note)
    data = open_data(data_section(values), model, seed=values["seed"])
    with console.status(f"evaluate on {len(data.test):,} images"):
        result = evaluate(
            model,
            data.test,
            batch_size=values["batch_size"],
            device=resolve_device(values["device"]),
            precision=values["precision"],
        )
    result.require_finite()
    console.show(
        f"accuracy {100 * result.accuracy:.2f} %, loss {result.loss:.4f}, {result.images:,} images"
    )
    write_json(values["json_file"], result)


@main.command("inspect")
@model_options
@click.option("--plot", type=NEW_PLOT, help="draw the singular-value spectra and chosen ranks")
@click.option("--cuts", is_flag=True, help="show the local blocks instead")
@settings_options(CutSettings)
@json_option
def inspect_command(plot: Path | None, cuts: bool, **values: Any) -> None:
    """Show a model's layers: kind, shape, scheme, rank, parameters, MACs, error."""
    section = model_section(values)
    model = build(section, note=console.note)
    if not cuts and (unused := given(CutSettings, values)):
        raise click.UsageError(f"{unused[0]} is for --cuts")
    if cuts and plot:
        raise click.UsageError("--plot is not for --cuts")
    if cuts:
        blocks = describe_cuts(model, example_of(model), collect(CutSettings, values))
        console.show(tables.cuts_table(blocks))
        write_json(values["json_file"], blocks)
        return
    found = inspecting.inspect(model, example=example_of(model))
    console.show(tables.inspection_table(found))
    write_json(values["json_file"], found)
    if plot:
        draw_spectra(inspecting.spectra(model), {row.name: row.rank for row in found.layers}, plot)


@main.command("doctor")
@json_option
def doctor_command(json_file: Path | None) -> None:
    """Print versions, devices, the providers that really load, and what is missing."""
    found = doctor()
    console.show(tables.doctor_table(found))
    write_json(json_file, found)


def _refuse_idle(values: dict[str, Any]) -> None:
    """Refuse options of `convert` that others make idle."""
    asked = given(ConvertSection, values)
    if values["plan_file"] is not None:
        planning = ["--layer"] * bool(values["layers"])
        planning += [option for option in asked if option in ("--rank", "--scheme", "--batch")]
        if planning:
            raise click.UsageError(f"{planning[0]} is for making a plan: --plan has one; edit it")
    calibrating = [option for option in asked if option.startswith("--calibrat")]
    if values["calibrate"] is None and calibrating:
        raise click.UsageError(f"{calibrating[0]} goes with --calibrate DATA")


def _layer_exception(text: str) -> tuple[str, Any]:
    """'layer4.*=64' or 'fc=keep'."""
    glob, separator, value = text.partition("=")
    if not separator:
        raise click.UsageError(f"--layer {text}: write GLOB=RANK or GLOB=keep")
    return glob, "keep" if value == "keep" else {"rank": value}
