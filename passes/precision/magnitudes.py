"""How large the values of a float32 graph grow, and what has to stay in float32 for float16 to hold the rest.

A fused operator is looked into: a value inside of it that does not fit keeps the whole operator in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes.precision.half_tensors import FLOAT16_MAX
from sdc.passes.precision.operator_types import output_dtype
from sdc.passes.simplify.inline_functions import InlineFunctions

MAGNITUDES = "sdc.magnitudes"
"""Name of the extra output: float32, [number of tensors]."""

LIMIT = FLOAT16_MAX / 2
"""Magnitudes beyond it count as too large: other prompts and seeds than those seen may double them."""

_SITE = "sdc.site"


@dataclass(frozen=True)
class Observed:
    """A graph that tells its magnitudes.

    Attributes:
        model: with the extra output, functions inlined.
        tensors: names of what is observed, in the order of the output.
        sites: for each, the first output of the node that writes it, in the graph before inlining.
        readers: for each, likewise of the nodes that read it.
    """

    model: ir.Model
    tensors: tuple[str, ...]
    sites: tuple[str, ...]
    readers: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Overflow:
    """What does not fit into float16.

    Attributes:
        first: output of the first node, in the order of the graph, whose values do not fit.
        magnitude: the largest of them.
        tensors: how many tensors do not fit.
        float32: first outputs of the nodes that have to compute in float32: those that write such values, and those
            that read them; what these write fits again, or they are among the former.
    """

    first: str
    magnitude: float
    tensors: int
    float32: tuple[str, ...]


def observe_magnitudes(model: ir.Model) -> Observed:
    """A copy of `model` with the largest magnitude of every float32 tensor as one small output.

    What reads a tensor for it stands directly behind the node that writes it: in this order nothing is held longer.

    Raises:
        PassError: it has no such tensor.
    """
    flat = model.clone()
    for node in flat.graph:
        node.metadata_props[_SITE] = node.outputs[0].name or ""
    InlineFunctions(fused=True).run(flat)  # what is inlined has the metadata of the call
    _infer_types(flat.graph)
    values = [value for node in flat.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    if not values:
        raise PassError("the graph has no float32 tensors: magnitudes are observed before any precision pass")
    readers = tuple(tuple(node.metadata_props[_SITE] for node in value.consumers()) for value in values)
    sites = tuple(_site_of(value) for value in values)
    _add_output(flat.graph, values)
    return Observed(flat, tuple(value.name or "" for value in values), sites, readers)


def find_overflow(observed: Observed, magnitudes: np.ndarray, *, limit: float = LIMIT) -> Overflow | None:
    """What does not fit, from the largest magnitudes over all runs; None if everything does.

    Infinity fits: what is infinite in float32 (a mask) is the same in float16.
    """
    large = [index for index, magnitude in enumerate(magnitudes) if limit < magnitude < np.inf]
    if not large:
        return None
    names = {observed.sites[index] for index in large} | {name for index in large for name in observed.readers[index]}
    first = large[0]
    return Overflow(observed.sites[first], float(magnitudes[first]), len(large), tuple(sorted(names)))


def _infer_types(graph: ir.Graph) -> None:
    """Element types of what was inlined: bodies of functions have none."""
    for node in graph:
        version = graph.opset_imports.get(node.domain, 1)
        for index, output in enumerate(node.outputs):
            dtype = output.dtype or output_dtype(node, index, version)
            if dtype is not None:
                output.type = ir.TensorType(dtype)


def _site_of(value: ir.Value) -> str:
    node = value.producer()
    assert node is not None  # observed values are outputs of nodes
    return node.metadata_props[_SITE]


def _add_output(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    shape = ir.Value(name=f"{MAGNITUDES}.shape", const_value=ir.tensor(np.array([1], np.int64)))
    graph.register_initializer(shape)
    rows = []
    for index, value in enumerate(values):
        magnitude = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
        row = ir.node("Reshape", [largest.outputs[0], shape])
        writer = value.producer()
        assert writer is not None  # observed values are outputs of nodes
        graph.insert_after(writer, [magnitude, largest, row])
        row.outputs[0].name = f"{MAGNITUDES}.{index}"
        rows.append(row.outputs[0])
    joined = ir.node("Concat", rows, {"axis": 0})
    output = joined.outputs[0]
    output.name, output.shape, output.dtype = MAGNITUDES, ir.Shape([len(rows)]), ir.DataType.FLOAT
    graph.append(joined)
    graph.outputs.append(output)
