"""What counts as agreement, and how what can't be run is told."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from converter.errors import StiefelError
from export import parity
from export.parity import difference


@given(st.integers(-6, 6), st.floats(0.1, 10), st.integers(0, 4))
def test_the_relative_difference_does_not_depend_on_the_unit(exponent, error, at):
    reference = np.linspace(-3.0, 2.0, 5)
    found = reference.copy()
    found[at] += error
    scale = 10.0**exponent
    one, other = difference(reference, found), difference(scale * reference, scale * found)
    assert one.relative == pytest.approx(error / 3)
    assert other.relative == pytest.approx(one.relative)
    assert other.absolute == pytest.approx(scale * one.absolute)
    assert one.count == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_is_infinitely_far(bad):
    good = np.ones(3)
    for pair in ((good, np.array([1, bad, 1])), (np.array([1, bad, 1]), good)):
        assert difference(*pair).relative == np.inf
    assert difference(good, np.ones(4)).relative == np.inf
    assert difference(np.zeros(2), np.full(2, 1e-9)).relative == np.inf
    assert difference(np.zeros(2), np.zeros(2)).relative == 0


def test_differences_join_to_the_worst():
    joined = parity.Difference(1.0, 0.5, 3) | parity.Difference(2.0, 0.1, 4)
    assert joined == parity.Difference(2.0, 0.5, 7)


def test_an_output_that_ignores_its_input_proves_nothing():
    inputs = [torch.randn(2, 4), torch.randn(3, 4)]
    model = nn.Linear(4, 3)
    assert not parity.is_vacuous(model, inputs)
    nn.init.zeros_(model.weight)
    assert parity.is_vacuous(model, inputs)


def one_node(operator: str, domain: str = "") -> bytes:
    """A model of one operator on x (2)."""
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "y")
    ]
    nodes = [onnx.helper.make_node(operator, ["x"], ["y"], domain=domain)]
    graph = onnx.helper.make_graph(nodes, "one", values[:1], values[1:])
    opsets = [onnx.helper.make_opsetid("", 18)]
    opsets += [onnx.helper.make_opsetid(domain, 1)] if domain else []
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


BAD_FILES = {
    "text.onnx": (b"# no model\n" * 20, "not an ONNX file, or cut short"),
    "empty.onnx": (b"", "not an ONNX file, or cut short"),
    "cut.onnx": (one_node("Relu")[:-9], "not an ONNX file, or cut short"),
    "operator.onnx": (one_node("Frobnicate"), "needs the operator Frobnicate, "),
    "domain.onnx": (one_node("Relu6", "org.elsewhere"), "needs the operator org.elsewhere:Relu6, "),
}


@pytest.mark.parametrize("name", [*BAD_FILES, "missing.onnx", "folder.onnx"])
def test_a_bad_file_is_one_clear_line_that_names_it(tmp_path, name):
    content, message = BAD_FILES.get(name, (None, "no such file"))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    if name == "folder.onnx":
        (tmp_path / name).mkdir()
    with pytest.raises(StiefelError, match=message) as caught:
        parity.session(tmp_path / name)
    line = str(caught.value)
    assert line.count(name) == 1
    assert "\n" not in line
    assert not any(noise in line for noise in ("[ONNXRuntimeError]", ".cc:", "Traceback"))


def test_a_session_computes(tmp_path):
    found = parity.run(parity.session(one_node("Relu")), torch.tensor([-1.0, 2.0]))
    assert [array.tolist() for array in found] == [[0.0, 2.0]]
