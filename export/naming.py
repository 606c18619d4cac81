"""Names in an ONNX graph that say which layer each node, weight and axis belongs to."""

import json
import re
from typing import Any

from torch import Tensor, nn


def tidy(graph_model: Any, model: nn.Module, axes: dict[int, str]) -> None:
    """Name nodes and weights after layers, axes after their meaning; drop build-machine traces."""
    graph = graph_model.graph
    symbols = {str(graph.inputs[0].shape[axis]): name for axis, name in axes.items()}
    taken = dict.fromkeys(graph.initializers, 0)
    for node in graph:
        scopes = json.loads(
            node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]").replace("'", '"')
        )
        layer = scopes[-2] if len(scopes) > 1 else ""
        if layer.startswith("_empty"):
            layer = ""
        _name_weights(graph, node, layer, model)
        base = f"{layer}/{node.op_type}" if layer else node.op_type
        taken[base] = count = taken.get(base, -1) + 1
        node.name = f"{base}_{count}" if count else base
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            _name_axes(value, symbols)
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
        _name_axes(value, symbols)


def _name_weights(graph: Any, node: Any, layer: str, model: nn.Module) -> None:
    """A weight that the exporter transposed lost its name; give it its layer's."""
    wanted = f"{layer}.weight"
    if not layer or wanted in graph.initializers or node.op_type != "MatMul":
        return
    try:
        weight = model.get_submodule(layer).weight
    except AttributeError:
        return
    value = node.inputs[1]
    if (
        isinstance(weight, Tensor)
        and value.is_initializer()
        and value.name.startswith("val_")
        and tuple(value.shape.numpy()) == tuple(weight.mT.shape)
    ):
        value.name = wanted


def _name_axes(value: Any, symbols: dict[str, str]) -> None:
    if value.shape is None:
        return
    for axis, size in enumerate(value.shape):
        text = str(getattr(size, "value", size))
        named = re.sub(r"\bs\d+\b", lambda found: symbols.get(found[0], found[0]), text)
        if named != text:
            value.shape[axis] = named
