"""Sizes of a graph's buffers beside those of the tensors that ONNX Runtime makes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from equality import run_model

from sdc.passes.memory.from_graph import buffers_from_graph


def assert_sizes_are_made(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> int:
    """Fail unless every buffer is as large as the tensor of its name; returns the number of buffers."""
    graph, sizes = buffers_from_graph(model), symbol_sizes(model, feeds)
    made = made_bytes(model, feeds)
    predicted = {buffer.name: buffer.bytes_at(sizes) for buffer in graph.buffers}
    assert predicted == {name: made[name] for name in predicted}
    return len(predicted)


def symbol_sizes(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """What the symbols of a graph's inputs stand for."""
    return {
        str(symbol.value): size
        for value in model.graph.inputs
        for symbol, size in zip(value.shape or (), feeds[value.name or ""].shape, strict=True)
        if isinstance(symbol, ir.SymbolicDim)
    }


def made_bytes(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Bytes of every tensor that ONNX Runtime computes, by name."""
    known = {value.name for value in model.graph.outputs}
    values = [value for node in model.graph for value in node.outputs if value.name and value.name not in known]
    model.graph.outputs.extend(values)
    made = {name: array.nbytes for name, array in run_model(model, feeds).items()}
    del model.graph.outputs[-len(values) :]
    return made
