"""An ONNX file computes what torch does, says what it is, or does not appear."""

import errno
import json

import onnx
import onnx_ir
import pytest
import torch
from torch import nn

import export.onnx as exporter
from converter.convert import convert, plan
from converter.errors import StiefelError
from export import parity
from export.onnx import OnnxSettings, export_onnx

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Net(nn.Module):
    """Strided convolutions with batch norm, a dropout, a linear head; any image size."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, 2),
        )
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.drop(self.body(x).mean((2, 3))))


class Attending(nn.Module):
    """Patches, one attention, a head on the flattened rest: one image size only."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        return self.head(self.attention(x, x, x, need_weights=False)[0].flatten(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, factor):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    model = factor(Net())
    real = torch.rand(5, 3, 16, 16)
    result = export_onnx(model, path, example=EXAMPLE, inputs=real, accuracy=0.875)
    return model, path, result


def differs(model, path, *shape) -> float:
    return parity.outputs_differ(model, path, [torch.randn(shape)]).relative


def values(graph):
    return [value for node in graph.node for value in (*node.input, *node.output)]


def test_the_file_takes_any_batch_and_image_size(exported):
    model, path, result = exported
    assert result.dynamic == ("batch", "height", "width")
    for shape in ((1, 3, 16, 16), (7, 3, 16, 16), (2, 3, 33, 20)):
        assert differs(model, path, *shape) < 1e-5
    axes = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [a.dim_param or a.dim_value for a in axes] == ["batch", 3, "height", "width"]


def test_the_graph_is_standard_lean_and_valid(exported):
    _, path, result = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert result.opset == 20
    assert not model.functions
    operators = [node.op_type for node in model.graph.node]
    assert {node.domain for node in model.graph.node} == {""}
    assert operators == ["Conv", "Relu", "Conv", "Conv", "ReduceMean", "Gemm", "Gemm"]


def test_nodes_and_weights_are_named_after_layers(exported):
    model, path, result = exported
    graph = onnx.load(path).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert [n for n in names if "Conv" in n] == ["body.0/Conv", "body.3.0/Conv", "body.3.1/Conv"]
    weights = {weight.name for weight in graph.initializer}
    assert weights >= {"body.0.weight", "body.3.0.weight", "head.1.weight", "head.1.bias"}
    assert set(values(graph)) >= {"input", "output"}
    assert result.ranks == {"body.3": model.body[3].rank, "head": model.head.rank}


class Reads(nn.Module):
    """Reads a layer's weight instead of calling the layer, as Swin does."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(32, 96), nn.Linear(96, 5)

    def forward(self, x):
        tokens = x.flatten(2).mT
        mixed = nn.functional.linear(tokens, self.qkv.weight, self.qkv.bias)
        return self.head(mixed.mean(1))


def test_weights_that_a_model_reads_keep_their_names_too(tmp_path):
    net = Reads().eval()
    small = convert(net, plan(net, 4, layers={"head": "keep"}))
    path = tmp_path / "reads.onnx"
    export_onnx(small, path, example=torch.randn(2, 32, 4, 4))
    weights = {w.name for w in onnx.load(path).graph.initializer if len(w.dims) == 2}
    assert weights == {"qkv.0.weight", "qkv.1.weight", "head.weight"}


def test_metadata_says_where_the_file_comes_from(exported):
    _, path, result = exported
    model = onnx.load(path)
    facts = {p.key: p.value for p in model.metadata_props}
    assert json.loads(facts["ranks"]) == result.ranks
    assert float(facts["accuracy"]) == 0.875
    assert facts["precision"] == "fp32"
    assert facts["source"] == "Net"
    assert facts["stiefel_version"] == model.producer_version
    # Nothing of the machine that built it.
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert b".py" not in path.read_bytes()


def test_the_proof_covers_two_batches_and_the_real_inputs(exported):
    _, path, result = exported
    assert result.compared == "outputs"
    assert result.outputs_compared == (1 + 3 + 5) * 10
    assert 0 < result.max_abs_error < 1e-5
    assert result.file_size_bytes == path.stat().st_size


def test_a_dense_model_goes_through_the_same_exporter_in_fp16(tmp_path, stir):
    path, model = tmp_path / "half.onnx", stir(Net())
    settings = OnnxSettings(precision="fp16", opset=18, image_size="fixed")
    result = export_onnx(model, path, example=EXAMPLE, settings=settings)
    loaded = onnx.load(path)
    half = onnx.TensorProto.FLOAT16
    ends = (*loaded.graph.input, *loaded.graph.output)
    assert {v.type.tensor_type.elem_type for v in ends} == {half}
    assert {w.data_type for w in loaded.graph.initializer if len(w.dims) > 1} == {half}
    assert loaded.opset_import[0].version == 18
    assert result.dynamic == ("batch",)
    assert 1e-5 < result.max_rel_error < 0.03
    assert result.ranks == {}


@pytest.mark.parametrize("opset", [20, pytest.param(23, marks=pytest.mark.slow)])
def test_attention_is_written_without_arithmetic_on_shapes(tmp_path, factor, opset):
    path, model = tmp_path / "attention.onnx", factor(Attending())
    result = export_onnx(model, path, example=EXAMPLE, settings=OnnxSettings(opset=opset))
    graph = onnx.load(path).graph
    operators = {node.op_type for node in graph.node}
    assert ("Attention" in operators) is (opset >= 23)
    assert not operators & {"Identity", "Cast", "Sqrt", "Dropout"}
    assert result.dynamic == ("batch",)
    assert differs(model, path, 5, 3, 16, 16) < 1e-5


def test_large_weights_lie_outside_and_go_with_their_model(tmp_path, monkeypatch, factor, exported):
    model, inside, _ = exported
    path = tmp_path / "net.onnx"
    settings = OnnxSettings(image_size="fixed")
    monkeypatch.setattr(exporter, "EXTERNAL_DATA_ABOVE", 1000)
    result = export_onnx(model, path, example=EXAMPLE, settings=settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert path.stat().st_size < inside.stat().st_size < result.file_size_bytes * 1.5
    assert differs(model, path, 2, 3, 16, 16) < 1e-5
    # Without its data, or a part of it, it is no model.
    data = path.with_name("net.onnx.data")
    for spoil in (lambda: data.write_bytes(data.read_bytes()[:-500]), data.unlink):
        spoil()
        with pytest.raises(
            StiefelError, match=r"weights \(\.onnx\.data\) are missing or cut short"
        ):
            parity.session(path)
    # A smaller model in its place takes the data with it.
    monkeypatch.undo()
    export_onnx(nn.Linear(4, 2), path, example=torch.zeros(1, 4))
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def corrupted(monkeypatch, name: str) -> None:
    """Let the exporter lose a weight's sign."""
    tidy = exporter.tidy

    def spoil(graph_model, *others):
        tidy(graph_model, *others)
        weight = graph_model.graph.initializers[name]
        weight.const_value = onnx_ir.tensor(-weight.const_value.numpy(), name=name)

    monkeypatch.setattr(exporter, "tidy", spoil)


@pytest.mark.parametrize("zero_head", [False, True])
def test_a_wrong_result_names_the_first_layer_and_leaves_no_file(
    tmp_path, monkeypatch, factor, zero_head
):
    """With a head of zeros the outputs agree, so the layers are compared."""
    model = factor(Net(), layers={"head": "keep"})
    if zero_head:
        nn.init.zeros_(model.head.weight)
    corrupted(monkeypatch, "body.3.1.weight")
    settings = OnnxSettings(image_size="fixed")
    with pytest.raises(StiefelError, match=r"layer (that differs is )?body\.3\.1 \(conv2d"):
        export_onnx(model, tmp_path / "net.onnx", example=EXAMPLE, settings=settings)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")

    def half(model, target, **options):
        target.write_bytes(b"half a model")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", half)
    with pytest.raises(StiefelError, match=r"cannot write .*net\.onnx: No space left on device"):
        export_onnx(nn.Linear(4, 2), path, example=torch.zeros(1, 4))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


class Restless(nn.Module):
    def forward(self, x):
        return x + torch.rand(3)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Branching(), {}, r"cannot export Branching to ONNX: .*data-dependent Python control flow"),
        (Bessel(), {}, r"there is no translation of torch\.ops\.\w+\.bessel_j0\.default$"),
        (Restless(), {}, "differs from torch's"),
        (nn.Linear(3, 2), {"example": None}, "give an example input"),
        (nn.Linear(3, 2), {"example": torch.zeros(3)}, r"must be a batch \(N, ...\), not \(3,\)"),
        (nn.Linear(4, 2), {}, "cannot export Linear to ONNX: "),
    ],
)
def test_what_cannot_be_exported_is_one_clear_line(tmp_path, model, options, message):
    with pytest.raises(StiefelError, match=message) as caught:
        export_onnx(model, tmp_path / "x.onnx", **{"example": torch.zeros(1, 3)} | options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class Cancelling(nn.Module):
    """All that counts is what its weights differ from one by: in half precision nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(1 + 1e-4 * torch.rand(4, 16))

    def forward(self, x):
        return nn.functional.linear(x, self.weight - 1)


def test_where_half_precision_is_too_coarse_the_capture_is_not_blamed(tmp_path):
    settings = OnnxSettings(precision="fp16")
    with pytest.raises(StiefelError, match=r"in fp16, which is too coarse for this model$"):
        export_onnx(
            Cancelling(), tmp_path / "x.onnx", example=torch.zeros(1, 16), settings=settings
        )
    assert not list(tmp_path.iterdir())


def test_the_tolerance_is_the_users(tmp_path):
    settings = OnnxSettings(precision="fp16", tolerance=1e-9)
    with pytest.raises(StiefelError, match=r"\(allowed: 1e-09\)"):
        export_onnx(
            nn.Linear(64, 64), tmp_path / "x.onnx", example=torch.zeros(1, 64), settings=settings
        )
