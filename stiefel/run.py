"""A recipe, start to end: build → pretrain → convert → train → export → bench → report."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from converter import convert as factoring
from converter.checkpoints import load_any, save_dense, save_factored
from converter.cost import count_macs, count_parameters
from converter.rank_plan import RankPlan
from export.bench import bench
from export.doctor import environment
from export.onnx import export_onnx
from export.result import ExportResult
from export.safetensors import export_safetensors
from stiefel import report as rendering
from stiefel.console import Console
from stiefel.materials import (
    build,
    calibration_images,
    example_of,
    make_plan,
    open_data,
    require_spec,
)
from stiefel.preflight import check
from stiefel.recipe import Recipe, resolved
from stiefel.run_folder import keep, open_folder
from trainers.data import images
from trainers.device import resolve_device
from trainers.distributed import process_count
from trainers.evaluate import evaluate
from trainers.memory import activation_memory_mib
from trainers.rank_schedule import look, shortfall
from trainers.rules import BP
from trainers.rules.idle import idle
from trainers.trainer import History, TrainSettings, train_local

# The training batch whose activations are weighed: small enough for any machine, scales linearly.
MEMORY_BATCH = 64


def run(recipe: Recipe, folder: Path, console: Console, *, resume: bool = False) -> dict[str, Any]:
    """Carry out a recipe in a run folder and return its report.

    Each stage leaves its checkpoint and its figures in the folder, so that `resume` goes on where
    an interrupted run stopped, in the middle of training too. Sections of stages that have not
    begun may differ from those of the interrupted run.

    Raises:
        StiefelError: a stage could not be done; what came before it is kept.
        KeyboardInterrupt: training was interrupted; what was finished is kept.
    """
    road = Road(recipe, folder, console, resume)
    dense = road.dense()
    small = road.converted(dense) if recipe.convert else None
    if recipe.train:
        small = road.trained(small, dense)
    if recipe.export:
        road.exported(dense, small)
    if recipe.bench:
        road.benched(dense, small)
    return road.finish()


def dry_run(recipe: Recipe) -> RankPlan | None:
    """The rank plan of a recipe, from the model as it is before any training; writes nothing."""
    torch.manual_seed(recipe.seed)
    model = build(recipe.model)
    check(recipe, model)
    if recipe.convert is None:
        return None
    data = None
    if recipe.convert.calibrate == "data":
        data = open_data(recipe.data, model, seed=recipe.seed)
    return make_plan(model, recipe.convert, calibration_images(recipe.convert, model, data))


class Road:
    """One recipe on its way: the run folder, the figures so far, and each stage's work."""

    def __init__(self, recipe: Recipe, folder: Path, console: Console, resume: bool) -> None:
        self.recipe, self.folder, self.console = recipe, folder, console
        self.device = resolve_device(recipe.device)
        torch.manual_seed(recipe.seed)
        # Everything that can be found wrong is found before the folder is touched.
        self._model = build(recipe.model, note=console.note)
        check(recipe, self._model)
        self.data = open_data(recipe.data, self._model, seed=recipe.seed)
        self.figures = open_folder(folder, recipe, resume=resume)

    def dense(self) -> nn.Module:
        """The dense model, trained first where the recipe says so."""
        path, model = self.folder / "dense.safetensors", self._model
        if "dense" in self.figures:
            return load_any(path)
        if self.recipe.pretrain:
            history = self._train("pretraining", model, BP(), self.recipe.pretrain, None)
            self.figures["pretraining"] = history_figures(history)
        save_dense(model, path)
        self._measure("dense", model, path, BP())
        return model

    def converted(self, dense: nn.Module) -> nn.Module:
        """The factored model, before any training of its own."""
        path, section = self.folder / "converted.safetensors", self.recipe.convert
        if "converted" in self.figures:
            return load_any(path)
        calibration = calibration_images(section, dense, self.data, seed=self.recipe.seed)
        start = time.perf_counter()
        with self.console.progress("convert") as progress:
            plan = make_plan(dense, section, calibration, device=self.device, progress=progress)
            model = factoring.convert(
                dense,
                plan,
                calibration=calibration,
                settings=section.calibration,
                device=self.device,
                progress=progress,
            )
        seconds = time.perf_counter() - start
        save_factored(model, path, history={"step": "convert", "policy": plan.policy})
        self.figures["plan"] = plan.model_dump(mode="json")
        self._measure("converted", model, path, None, convert_seconds=seconds)
        return load_any(path)  # with its history

    def trained(self, converted: nn.Module | None, dense: nn.Module) -> nn.Module:
        """The factored model after local training; the dense one's copy where none is factored."""
        path, section = self.folder / "trained.safetensors", self.recipe.train
        if "trained" in self.figures:
            return load_any(path)
        model, teacher = converted, dense if section.teach else None
        if model is None:
            # Training is in place, and a model has nothing to learn from itself.
            model, teacher = load_any(self.folder / "dense.safetensors"), None
        settings = TrainSettings(**section.model_dump(exclude={"rule", "teach"}))
        for remark in idle(section.rule, self.device, process_count()):
            self.console.note(remark)
        history = self._train("training", model, section.rule, settings, teacher)
        if missed := shortfall(settings.ranks, look(model)):
            self.console.note(missed)
        save_factored(model, path, history={"step": "train-local", "rule": section.rule.name})
        self.figures["training"] = history_figures(history)
        self._measure("trained", model, path, section.rule, teacher=teacher)
        return model

    def exported(self, dense: nn.Module, small: nn.Module | None) -> None:
        """The files for deployment, each proved against torch."""
        if "export" in self.figures:
            return
        formats, figures = self.recipe.export.formats, {}
        small = dense if small is None else small
        known = self.figures[self._last_stage()]["accuracy"]
        if "safetensors" in formats:
            path = self.folder / "small.safetensors"
            result = export_safetensors(small, path, accuracy=known)
            figures["safetensors"] = _file_figures(result)
        if "onnx" in formats:
            for key, model in (("onnx_dense", dense), ("onnx", small)):
                name = "dense.onnx" if model is dense else "small.onnx"
                with self.console.status(f"export {name}"):
                    result = export_onnx(
                        model,
                        self.folder / name,
                        inputs=self._test_images(),
                        settings=self.recipe.export.onnx,
                        accuracy=known if model is small else self.figures["dense"]["accuracy"],
                    )
                figures[key] = _file_figures(result)
        self._keep("export", figures)

    def benched(self, dense: nn.Module, small: nn.Module | None) -> None:
        """Dense against factored, side by side."""
        if "bench" in self.figures:
            return
        # Without ONNX files, the run's own checkpoints.
        files = ("dense.safetensors", f"{self._last_stage()}.safetensors")
        if "onnx" in self.figures.get("export", {}):
            files = ("dense.onnx", "small.onnx")
        contenders, models = {"dense": self.folder / files[0]}, {"dense": dense}
        if small is not None:
            name = "factored" if self.recipe.convert else "trained"
            contenders[name], models[name] = self.folder / files[1], small
        with self.console.progress("bench") as progress:
            result = bench(
                contenders,
                self.recipe.bench,
                modules=models,
                example=example_of(dense),
                progress=progress,
            )
        self.figures["bench_ratios"] = [r.model_dump(mode="json") for r in result.ratios]
        self.figures["bench_ceilings"] = list(result.ceilings)
        self._keep("bench", [row.model_dump(mode="json") for row in result.rows])

    def finish(self) -> dict[str, Any]:
        """Write and return the report."""
        report = {
            "recipe": resolved(self.recipe),
            "environment": environment(self.device) | {"seed": self.recipe.seed},
            "data": {
                "name": self.data.name,
                "train_images": len(self.data.train),
                "test_images": len(self.data.test),
                "classes": len(self.data.classes),
            },
            **self.figures,
        }
        rendering.write(report, self.folder)
        return report

    def _train(
        self,
        title: str,
        model: nn.Module,
        rule: Any,
        settings: TrainSettings,
        teacher: nn.Module | None,
    ) -> History:
        settings = settings.model_copy(
            update={"seed": self.recipe.seed, "device": self.recipe.device}
        )
        out = self.folder / title
        with self.console.training(title) as progress:
            history = train_local(
                model,
                self.data,
                rule=rule,
                settings=settings,
                teacher=teacher,
                out=out,
                resume=(out / "state.pt").exists(),
                progress=progress,
            )
        if history.interrupted:
            raise KeyboardInterrupt
        return history

    def _measure(
        self,
        stage: str,
        model: nn.Module,
        path: Path,
        rule: Any,
        *,
        teacher: nn.Module | None = None,
        **extra: float,
    ) -> None:
        """Accuracy and costs of a stage; with a rule, what training with it holds in memory."""
        model.cpu()
        with self.console.status(f"evaluate {stage}"):
            evaluation = evaluate(model, self.data.test, device=self.device)
        evaluation.require_finite(f"{stage}: the model")
        model.cpu()
        figures = {
            "accuracy": evaluation.accuracy,
            "loss": evaluation.loss,
            "parameters": count_parameters(model),
            "macs": count_macs(model, example_of(model)),
            "file_size_bytes": path.stat().st_size,
            **extra,
        }
        if rule is not None:
            batch = example_of(model, MEMORY_BATCH)
            figures["activation_memory_mib"] = activation_memory_mib(
                model, rule, batch, num_classes=require_spec(model).num_classes, teacher=teacher
            )
            figures["activation_memory_batch"] = MEMORY_BATCH
        self._keep(stage, figures)

    def _last_stage(self) -> str:
        """The last stage that yielded a model."""
        return next(s for s in ("trained", "converted", "dense") if s in self.figures)

    def _keep(self, stage: str, figures: Any) -> None:
        self.figures[stage] = figures
        keep(self.folder, self.recipe, self.figures)

    def _test_images(self) -> torch.Tensor:
        return images(self.data.test, min(8, len(self.data.test)), self.recipe.seed)


def history_figures(history: History) -> dict[str, Any]:
    """A training history as plain data, with the ranks that it ended on."""
    records = history.records
    looks = {"diagnostics": history.diagnostics} if history.diagnostics else {}
    return {
        "records": records,
        "best_accuracy": history.best_accuracy,
        "ranks": records[-1]["ranks"] if records else {},
        **looks,
    }


def _file_figures(result: ExportResult) -> dict[str, Any]:
    """An export's figures, its path relative to the run folder, which may be moved."""
    return {**result.model_dump(mode="json"), "path": result.path.name}
