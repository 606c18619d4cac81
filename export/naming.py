"""Names in an ONNX graph that say which layer each node, weight and axis belongs to."""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

Named = tuple[str, Tensor]


def tidy(graph_model: Any, model: nn.Module, axes: dict[int, str]) -> None:
    """Name nodes and weights after layers, axes after their meaning; drop build-machine traces."""
    graph = graph_model.graph
    symbols = {str(graph.inputs[0].shape[axis]): name for axis, name in axes.items()}
    taken = dict.fromkeys(graph.initializers, 0)
    weights = _by_transposed_shape(model)
    for node in graph:
        scopes = json.loads(
            node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]").replace("'", '"')
        )
        layer = scopes[-2] if len(scopes) > 1 else ""
        if layer.startswith("_empty"):
            layer = ""
        _name_weights(graph, node, weights)
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


def _name_weights(graph: Any, node: Any, weights: Mapping[tuple[int, ...], list[Named]]) -> None:
    """A weight that the exporter transposed lost its name; give it its parameter's."""
    value = node.inputs[1] if node.op_type == "MatMul" else None
    if value is None or not value.is_initializer() or not value.name.startswith("val_"):
        return
    given = value.const_value.numpy()
    for name, weight in weights.get(given.shape, ()):
        if name not in graph.initializers and np.array_equal(given, weight.mT.numpy()):
            value.name = name
            return


def _by_transposed_shape(model: nn.Module) -> dict[tuple[int, ...], list[Named]]:
    found: dict[tuple[int, ...], list[Named]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            shape = tuple(parameter.mT.shape)
            found.setdefault(shape, []).append((name, parameter.detach().cpu()))
    return found


def _name_axes(value: Any, symbols: dict[str, str]) -> None:
    if value.shape is None:
        return
    for axis, size in enumerate(value.shape):
        text = str(getattr(size, "value", size))
        named = re.sub(r"\bs\d+\b", lambda found: symbols.get(found[0], found[0]), text)
        if named != text:
            value.shape[axis] = named
