"""Doctor tries things before it says that they work, and has a remedy for what doesn't."""

import json

import onnxruntime
import pytest
import torch

from export import doctor as module
from export.doctor import doctor, environment, try_provider


@pytest.fixture(autouse=True)
def _fresh():
    try_provider.cache_clear()
    yield
    try_provider.cache_clear()


def test_the_report_is_plain_data_with_the_versions_that_are_installed():
    report = doctor()
    assert json.loads(json.dumps(report)) == report
    assert report["environment"]["torch"] == torch.__version__.partition("+")[0]
    assert report["environment"]["threads"] == torch.get_num_threads()
    assert report["providers"]["cpu"] == "loads"
    assert report["devices"][0]["device"] == "cpu"
    assert all(isinstance(line, str) and "\n" not in line for line in report["remedies"])


def test_a_provider_that_is_listed_but_does_not_run_is_not_said_to_load(monkeypatch):
    """What counts is a model that really ran."""

    def refuse(*arguments, **options):
        raise RuntimeError("CUDA driver is too old\nand more")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    assert try_provider("CPUExecutionProvider") == "CUDA driver is too old"
    assert try_provider("NonsuchExecutionProvider") == "not part of this onnxruntime package"


def steps_down(monkeypatch, name, said):
    """Let a session that was asked for `name` run on the CPU, and the loader say something."""

    class OnCpu:
        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [name])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **o: OnCpu())
    monkeypatch.setattr(module, "preload", lambda buffer: print(said))


def test_a_silent_step_down_to_the_cpu_is_noticed(monkeypatch):
    name = "CUDAExecutionProvider"
    steps_down(monkeypatch, name, "Failed to load libx.so: gone")
    assert try_provider(name) == "Failed to load libx.so: gone"


def test_tensorrt_is_not_blamed_on_a_library_of_cuda(monkeypatch):
    """Without TensorRT its own libraries are what is missing, whatever else CUDA lacks."""
    name = "TensorrtExecutionProvider"
    steps_down(monkeypatch, name, "Failed to load libcurand.so: gone")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda package: None)
    assert try_provider(name) == "TensorRT's libraries are not installed"
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda package: package)
    try_provider.cache_clear()
    assert try_provider(name) == "Failed to load libcurand.so: gone"


@pytest.mark.parametrize(
    ("cuda", "why", "remedy"),
    [
        (False, "Failed to load libcurand.so.10", "pip install nvidia-curand"),
        (True, "does not load", "pip install 'onnxruntime-gpu"),
        (False, "not part of this onnxruntime package", None),
    ],
)
def test_what_is_missing_comes_with_what_to_do(monkeypatch, cuda, why, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    lines = list(module._remedies({"compiler": None}, {"cuda": why, "tensorrt": None}))
    assert any(line.startswith("torch.compile on the CPU needs a C++ compiler") for line in lines)
    about = [line for line in lines if "ONNX Runtime's CUDA provider" in line]
    assert (remedy is None and not about) or remedy in about[0]


def test_the_environment_names_no_machine(monkeypatch):
    monkeypatch.setattr(module.platform, "node", lambda: "secret-host")
    facts = environment()
    assert "secret-host" not in json.dumps(facts)
    assert facts["device"] == "cpu"
