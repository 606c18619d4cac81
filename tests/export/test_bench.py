"""Times are paired, ratios carry their spread, and a CUDA figure is one. Most clocks are fake."""

import gc
import json
import math
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import export.bench as module
import export.runtimes as runtimes
from converter.errors import StiefelError
from converter.models import load
from export import workload
from export.bench import BenchSettings, bench, median_interval
from export.ceilings import Ceiling
from export.onnx import OnnxSettings, export_onnx
from export.runtimes import CudaGraph, Loaded, OnnxRuntime, Runtime, Subject, fallen_back
from export.safetensors import export_safetensors

EXAMPLE = torch.zeros(1, 6)


def no_ceiling(monkeypatch) -> None:
    """Take the device's limits for known: 100 GFLOP/s, 10 GB/s."""
    monkeypatch.setattr(
        module, "ceiling", lambda device, precision: Ceiling(str(device), precision, 100, 10)
    )


class Bench:
    """A runtime on a clock of its own: each model's calls take what `seconds` says."""

    def __init__(self, seconds, drift: float = 0.0, jitter: float = 0.0):
        self.seconds, self.drift, self.jitter = seconds, drift, jitter
        self.now, self.log = 0.0, []
        self.random = np.random.default_rng(0)

    def call(self, name: str) -> None:
        self.log.append(name)
        slower = 1 + self.drift * self.now
        self.now += self.seconds[name] * slower * (1 + self.jitter * self.random.standard_normal())

    def run(self, monkeypatch, **settings):
        place = self

        class Fake(Runtime):
            name = "torch"

            def takes(self, subject, precision):
                return True

            def load(self, subject, device, precision, x, folder):
                place.now += 0.25
                return Loaded(lambda: place.call(subject.name), 4096)

        clock = SimpleNamespace(perf_counter=lambda: self.now)
        clock.perf_counter_ns = lambda: round(1e9 * self.now)
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setitem(module.RUNTIMES, "torch", Fake())
        no_ceiling(monkeypatch)
        models = {name: nn.Linear(6, 4) for name in self.seconds}
        options = {"runtimes": ["torch"], "devices": ["cpu"], "batches": [2]} | settings
        return bench(models, BenchSettings(**options), example=EXAMPLE)


def test_rounds_alternate_between_the_models(monkeypatch):
    place = Bench({"dense": 1e-3, "small": 1e-3})
    place.run(monkeypatch, rounds=4, calls=2, warmup=3)
    assert place.log == ["dense"] * 3 + ["small"] * 3 + (["dense"] * 2 + ["small"] * 2) * 4


def test_a_machine_that_slows_down_slows_both_sides(monkeypatch):
    """Four times slower at the end than at the start, and the ratio holds."""
    place = Bench({"dense": 3e-3, "small": 1e-3}, drift=1.0)
    report = place.run(monkeypatch, rounds=9, calls=30)
    (ratio,) = report.ratios
    assert place.now > 1.0
    assert ratio.speedup == pytest.approx(3.0, rel=0.1)
    assert ratio.speedup_low <= ratio.speedup <= ratio.speedup_high
    slowest, fastest = max(place.seconds.values()), min(place.seconds.values())
    assert report.rows[0].latency_ms_p50 > 1.2e3 * slowest > 1.2e3 * fastest


@pytest.mark.parametrize(
    ("other", "noise"), [(1.0, True), (1.01, True), (1.15, False), (0.5, False)]
)
def test_a_difference_is_called_noise_only_where_it_is(monkeypatch, other, noise):
    place = Bench({"dense": 1e-3, "small": 1e-3 * other}, jitter=0.02)
    report = place.run(monkeypatch)
    assert report.ratios[0].within_noise is noise
    assert ("within noise" in report.markdown()) is noise
    if not noise:
        assert report.ratios[0].speedup == pytest.approx(1 / other, rel=0.05)


def test_long_calls_cost_calls_and_never_rounds(monkeypatch):
    place = Bench({"dense": 10.0, "small": 1e-3})
    place.run(monkeypatch, rounds=5, calls=20, warmup=5, seconds=2.0)
    assert place.log.count("dense") == 2 + 5  # warm-up ends early too, but after the first call
    assert place.log.count("small") == 5 + 5 * 20


def test_rows_hold_what_was_measured(monkeypatch):
    place = Bench({"dense": 2e-3, "small": 1e-3})
    report = place.run(monkeypatch, batches=[2, 8], rounds=3, calls=5)
    row = report.rows[-1]
    assert (row.model, row.batch, row.calls) == ("small", 8, 15)
    for value in (row.latency_ms_p50, row.latency_ms_p95, row.latency_ms_p99):
        assert value == pytest.approx(1.0, rel=1e-6)
    assert row.throughput_per_s == pytest.approx(8000)
    assert row.load_time_ms == pytest.approx(250)
    assert row.file_size_bytes == 4096
    assert row.gflops_per_s == pytest.approx(2e-9 * 8 * 6 * 4 / 1e-3)
    assert row.compute_fraction == pytest.approx(row.gflops_per_s / 100)
    assert row.gbytes_per_s == pytest.approx(1e-9 * 4 * (6 * 4 + 4 + 8 * 6 + 8 * 4) / 1e-3)
    assert {"python", "torch", "threads", "device", "input_shape"} <= report.environment.keys()


def test_the_report_is_plain_json_and_a_markdown_table(monkeypatch):
    report = Bench({"dense": 2e-3, "small": 1e-3}).run(monkeypatch, batches=[1, 4])
    again = module.BenchReport(**json.loads(report.model_dump_json()))
    assert again == report
    table = [line for line in report.markdown().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({line.count("|") for line in table}) == 1
    assert "| baseline |" in table[2]
    assert "| 2.00× (2.00–2.00) |" in table[3]


@given(st.integers(1, 60))
def test_the_medians_interval_covers_it_and_is_the_narrowest_that_does(n):
    low, high = median_interval(range(n))

    def coverage(k: int) -> float:  # between the k-th from below and the k-th from above
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    k = low + 1
    assert high == n - k
    assert coverage(k) >= 0.95 or k == 1
    assert coverage(k + 1) < 0.95


def event(name, provider="CPU", outputs=({"float": [2, 8]},), kind="Node"):
    arguments = {"provider": f"{provider}ExecutionProvider", "output_type_shape": list(outputs)}
    return {"cat": kind, "name": f"{name}_kernel_time", "args": arguments}


def test_nodes_on_the_cpu_are_found_and_arithmetic_on_shapes_is_not_blamed():
    events = [
        event("body/Conv", "CUDA"),
        event("head/TopK"),
        event("Shape", outputs=({"int64": [4]},)),
        event("Gather", outputs=({"int64": []},)),
        event("NonZero", outputs=({"int64": [2, 900]},)),
        event("head/TopK"),
        event("session", kind="Session"),
    ]
    assert fallen_back(events) == ["head/TopK", "NonZero"]


def test_a_fallback_is_not_called_a_cuda_figure(monkeypatch, tmp_path):
    """The provider's profile is fake; all else is as on a machine with CUDA."""

    class Session:
        def end_profiling(self):
            path = tmp_path / "profile.json"
            path.write_text(json.dumps([event(f"layer{i}/TopK") for i in range(7)]))
            return str(path)

    monkeypatch.setattr(OnnxRuntime, "_session", lambda *args, **options: Session())
    monkeypatch.setattr(runtimes.parity, "run", lambda session, x: None)
    monkeypatch.setattr(Subject, "onnx_file", lambda *args: tmp_path / "net.onnx")
    with pytest.raises(
        StiefelError,
        match=r"^net: not a CUDA figure, for 7 nodes fell back to the CPU provider: "
        r"layer0/TopK, .*, layer4/TopK and 2 more$",
    ):
        OnnxRuntime().load(Subject("net"), torch.device("cuda"), "fp32", EXAMPLE, tmp_path)


def test_a_cuda_graph_keeps_the_weights_and_images_that_it_reads(monkeypatch):
    """It replays reads of their addresses. CUDA is fake."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    model, x = nn.Linear(3, 2), torch.ones(1, 3)
    run = CudaGraph()._runner(model, x)
    expected, read = model(x).detach(), [weakref.ref(model), weakref.ref(x)]
    del model, x
    gc.collect()
    assert all(ref() is not None for ref in read)
    torch.testing.assert_close(run(), expected)
    del run
    gc.collect()
    assert all(ref() is None for ref in read)


QUICK = BenchSettings(batches=(1, 3), devices=("cpu",), rounds=3, calls=2, seconds=0.05, threads=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory, factor) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bench")
    model = load("zoo:digits")
    small = factor(model, 4)
    fixed = OnnxSettings(image_size="fixed")
    export_onnx(model, folder / "dense.onnx", settings=fixed)
    export_safetensors(small, folder / "small.safetensors")
    return {path.suffix[1:]: path for path in folder.iterdir()}


def test_files_of_both_kinds_are_timed_side_by_side(files):
    threads = torch.get_num_threads()
    dense, compact = files["onnx"], files["safetensors"]
    report = bench([dense, compact], QUICK)
    # torch has no module for an ONNX file.
    assert [(row.model, row.runtime, row.batch) for row in report.rows] == [
        *((str(compact), "torch", batch) for batch in (1, 3)),
        *((str(path), "onnxruntime", batch) for batch in (1, 3) for path in (dense, compact)),
    ]
    for row in report.rows:
        assert row.latency_ms_p99 >= row.latency_ms_p95 >= row.latency_ms_p50 > 0
        assert row.throughput_per_s == pytest.approx(1e3 * row.batch / row.latency_ms_p50)
        assert row.compute_fraction > 0
        assert row.load_time_ms > 0
        assert row.file_size_bytes > 1000
    assert {(r.runtime, r.baseline, r.batch) for r in report.ratios} == {
        ("onnxruntime", str(dense), batch) for batch in (1, 3)
    }
    assert torch.get_num_threads() == threads


def test_a_named_model_is_timed_at_its_own_image_size_unless_one_is_named(files, monkeypatch):
    no_ceiling(monkeypatch)
    settings = QUICK.model_copy(update={"runtimes": ("torch",), "batches": (1,)})
    report = bench(["zoo:resnet20", "zoo:resnet32"], settings)
    assert report.environment["input_shape"] == [3, 32, 32]
    (ratio,) = report.ratios
    assert ratio.speedup_low <= ratio.speedup <= ratio.speedup_high
    settings = settings.model_copy(update={"image_size": 48})
    assert bench(["zoo:resnet20"], settings).environment["input_shape"] == [3, 48, 48]
    with pytest.raises(StiefelError, match=r"takes inputs of 1×8×8, not 1×48×48"):
        bench([files["onnx"], "zoo:digits"], settings)


def test_work_is_counted_alike_in_torch_and_in_the_onnx_file(files):
    x = torch.zeros(5, 1, 8, 8)
    model = load("zoo:digits")
    one = workload.of_module(model, x, itemsize=4)
    other = workload.of_onnx(files["onnx"], tuple(x.shape))
    assert one.macs == other.macs > 0
    assert other.bytes == pytest.approx(one.bytes, rel=0.02)


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        (["zoo:digits", "zoo:resnet20"], {}, r"zoo:resnet20 takes inputs of 3×32×32, not 1×8×8"),
        (["zoo:digits"], {"devices": ["cuda"]}, "CUDA"),
        (["zoo:digits"], {"runtimes": ["torch-cudagraph"]}, "runs on cuda only, not on cpu"),
        (["zoo:digits"], {"runtimes": ["onnxruntime"], "precisions": ["bf16"]}, "nothing to time"),
        (["nothing.onnx"], {}, "nothing.onnx: no such file"),
        (["zoo:nonsense"], {}, "nonsense"),
        ([nn.Linear(3, 2)], {}, "give an example input"),
        ([], {}, "at least one model"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(models, settings, message):
    if settings.get("devices") == ["cuda"] and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    options = {"devices": ["cpu"], "rounds": 3, "seconds": 0.01} | settings
    with pytest.raises(StiefelError, match=message) as caught:
        bench(models, BenchSettings(**options))
    assert "\n" not in str(caught.value)


def test_a_provider_that_does_not_load_says_why(monkeypatch):
    monkeypatch.setattr(runtimes, "try_provider", lambda provider: "libcudnn.so.9 is missing")
    with pytest.raises(StiefelError, match=r"libcudnn.so.9 is missing; `stiefel doctor`"):
        bench(["zoo:digits"], QUICK.model_copy(update={"runtimes": ("onnxruntime",)}))


@pytest.mark.parametrize("other", [{"runtimes": ("torch",)}, {"precisions": ("fp16",)}])
def test_a_model_that_no_setting_times_is_not_left_out_unsaid(files, other):
    settings = QUICK.model_copy(update=other)
    with pytest.raises(StiefelError, match=r"dense\.onnx: nothing to time in .*onnx|torch"):
        bench(["zoo:digits", files["onnx"]], settings)


def onnx_file(path: Path, batch: int | str, inputs: int) -> Path:
    """A sum of inputs (batch, 1, 8, 8)."""
    names = [f"x{i}" for i in range(inputs)]
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch, 1, 8, 8])
        for name in (*names, "y")
    ]
    nodes = [onnx.helper.make_node("Sum", names, ["y"])]
    graph = onnx.helper.make_graph(nodes, "sum", values[:-1], values[-1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def test_a_file_of_another_exporter_that_cannot_take_the_batch_is_told(tmp_path, monkeypatch):
    no_ceiling(monkeypatch)
    path = onnx_file(tmp_path / "one.onnx", batch=1, inputs=1)
    with pytest.raises(
        StiefelError, match=r"one\.onnx fails in onnxruntime on an input 3×1×8×8: ."
    ):
        bench([path], QUICK.model_copy(update={"runtimes": ("onnxruntime",), "batches": (3,)}))


def test_a_file_of_several_inputs_is_told_before_anything_runs(tmp_path):
    path = onnx_file(tmp_path / "two.onnx", batch="n", inputs=2)
    with pytest.raises(StiefelError, match=r"two\.onnx takes 2 inputs"):
        bench(["zoo:digits", path], QUICK)


@pytest.mark.parametrize("size", [5, 48])
def test_an_image_size_that_a_model_cannot_take_is_one_line(monkeypatch, size):
    no_ceiling(monkeypatch)
    settings = QUICK.model_copy(update={"image_size": size, "runtimes": ("torch",)})
    with pytest.raises(
        StiefelError, match=f"zoo:mlp fails in torch on an input 1×3×{size}"
    ) as found:
        bench(["zoo:resnet20", "zoo:mlp"], settings)
    assert "\n" not in str(found.value)


def test_a_file_cut_short_is_told_before_anything_runs(files, tmp_path):
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(files["onnx"].read_bytes()[:-500])
    with pytest.raises(StiefelError, match=r"cut\.onnx: not an ONNX file, or cut short"):
        bench([files["onnx"], cut], QUICK)


@pytest.mark.slow
def test_a_compiled_model_is_timed_after_it_compiled(factor):
    settings = QUICK.model_copy(update={"runtimes": ("torch-compile",), "batches": (2,)})
    (row,) = bench([factor(load("zoo:digits"), 4)], settings, example=torch.zeros(1, 1, 8, 8)).rows
    assert row.load_time_ms > 10 * row.latency_ms_p50
