"""Stiefel: networks that live on low-rank manifolds.

model = stiefel.load("torchvision:resnet18", checkpoint="resnet18.safetensors")
plan = stiefel.plan(model, rank="params=0.5", calibration=images)
small = stiefel.convert(model, plan, calibration=images)
history = stiefel.train_local(small, data, rule=stiefel.SSA(), teacher=model)
stiefel.export_onnx(small, "small.onnx")
"""

from importlib.metadata import version

from converter.calibration import Calibration
from converter.checkpoints import load_any, load_factored, save_dense, save_factored
from converter.convert import convert, plan
from converter.errors import StiefelError
from converter.inspect import inspect
from converter.models import load
from converter.ranks import Budget, Energy, Fixed, Fraction, RankPlan
from converter.specs import InputSpec, ModelSpec, spec_of
from export.bench import BenchSettings, bench
from export.compact import compact
from export.doctor import doctor
from export.onnx import OnnxSettings, export_onnx
from export.safetensors import export_safetensors
from trainers.data import Data, images, load_data
from trainers.evaluate import evaluate
from trainers.rules import BP, DFA, SSA
from trainers.trainer import TrainSettings, train_local

__version__ = version("stiefel")

__all__ = [
    "BP",
    "DFA",
    "SSA",
    "BenchSettings",
    "Budget",
    "Calibration",
    "Data",
    "Energy",
    "Fixed",
    "Fraction",
    "InputSpec",
    "ModelSpec",
    "OnnxSettings",
    "RankPlan",
    "StiefelError",
    "TrainSettings",
    "bench",
    "compact",
    "convert",
    "doctor",
    "evaluate",
    "export_onnx",
    "export_safetensors",
    "images",
    "inspect",
    "load",
    "load_any",
    "load_data",
    "load_factored",
    "plan",
    "save_dense",
    "save_factored",
    "spec_of",
    "train_local",
]
