"""Stiefel: networks that live on low-rank manifolds.

model = stiefel.load("torchvision:resnet18", checkpoint="resnet18.safetensors")
plan = stiefel.plan(model, rank="params=0.5", calibration=images)
small = stiefel.convert(model, plan, calibration=images)
history = stiefel.train_local(small, data, rule=stiefel.SSA(), teacher=model)
stiefel.export_onnx(small, "small.onnx")
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("stiefel")

_HOMES = {
    "converter.calibration": "Calibration",
    "converter.checkpoints": "load_any load_factored save_dense save_factored",
    "converter.convert": "convert plan revise",
    "converter.errors": "StiefelError",
    "converter.inspect": "inspect",
    "converter.models": "load",
    "converter.rank_plan": "RankPlan",
    "converter.ranks": "Budget Energy Fixed Fraction",
    "converter.specs": "InputChange InputSpec ModelSpec spec_of",
    "export.bench": "BenchSettings bench",
    "export.compact": "compact",
    "export.doctor": "doctor",
    "export.onnx": "OnnxSettings export_onnx",
    "export.safetensors": "export_safetensors",
    "trainers.data": "Data images load_data",
    "trainers.evaluate": "evaluate",
    "trainers.rules": "BP DFA SSA",
    "trainers.trainer": "TrainSettings train_local",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Fetched when first asked for: torch takes seconds to load."""
    if name not in _HOME:
        raise AttributeError(f"module 'stiefel' has no attribute '{name}'")
    globals()[name] = value = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
