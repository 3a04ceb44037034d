"""Buffer graphs as JSON: what bundles carry of their engines' graphs."""

from __future__ import annotations

import logging
from typing import Any

import onnx_ir as ir

from sdc.compiler.component import Component
from sdc.engines.checked_json import JsonValue
from sdc.engines.errors import BundleError, PassError
from sdc.passes.memory.buffers import Buffer, BufferGraph, Step
from sdc.passes.memory.from_graph import buffers_from_graph
from sdc.passes.shapes.sizes import Size

log = logging.getLogger(__name__)

MEMORY_REPORT = "reports/memory.json"
"""By component and target, the buffers of the graph that the engine was built from, or why they are unknown."""


def describe_memory(component: Component) -> dict[str, Any] | str:
    """The buffers of a lowered graph, for `sdc plan`; or why they are unknown, which stops no build."""
    try:
        return json_from_graph(buffers_from_graph(component.model))
    except PassError as error:
        log.warning("%s: its memory cannot be planned: %s", component.spec.name, error)
        return str(error)


def json_from_graph(graph: BufferGraph) -> dict[str, Any]:
    """Plain JSON values; `graph_from_json` is the inverse."""
    return {
        "weight_bytes": graph.weight_bytes,
        "inputs": [_buffer_row(buffer) for buffer in graph.inputs],
        "buffers": [_buffer_row(buffer) for buffer in graph.buffers],
        "outputs": list(graph.outputs),
        "steps": [[step.operator, list(step.reads), list(step.writes), list(step.overwrites)] for step in graph.steps],
    }


def _buffer_row(buffer: Buffer) -> list[int | str]:
    elements = buffer.elements if isinstance(buffer.elements, int) else str(buffer.elements.value)
    return [buffer.name, elements, buffer.dtype.name]


def graph_from_json(value: JsonValue) -> BufferGraph:
    """Read what `json_from_graph` wrote.

    Raises:
        BundleError: it did not write this, or a step reads what no step before it has written.
    """
    graph = BufferGraph(
        inputs=tuple(_read_buffer(each) for each in value.member("inputs").elements()),
        buffers=tuple(_read_buffer(each) for each in value.member("buffers").elements()),
        steps=tuple(_read_step(each) for each in value.member("steps").elements()),
        outputs=_read_indices(value.member("outputs")),
        weight_bytes=value.member("weight_bytes").integer(0),
    )
    _check_order(graph, value.place)
    return graph


def _read_buffer(value: JsonValue) -> Buffer:
    row = list(value.elements())
    if len(row) != 3:
        value.refuse("[name, elements, element type]")
    name, elements, dtype = row
    if dtype.value not in ir.DataType.__members__:
        dtype.refuse("the name of an ONNX element type")
    return Buffer(name.text(), _read_size(elements), ir.DataType[dtype.text()])


def _read_size(value: JsonValue) -> Size:
    if not isinstance(value.value, str):
        return value.integer(0)
    size = ir.SymbolicDim(value.text())
    try:
        size.free_symbols()
    except ValueError:
        value.refuse("a number or an expression of sizes")
    return size


def _read_step(value: JsonValue) -> Step:
    row = list(value.elements())
    if len(row) != 4:
        value.refuse("[operator, reads, writes, overwrites]")
    operator, *parts = row
    reads, writes, overwrites = (_read_indices(part) for part in parts)
    return Step(operator.text(), reads, writes, overwrites)


def _read_indices(value: JsonValue) -> tuple[int, ...]:
    return tuple(each.integer(0) for each in value.elements())


def _check_order(graph: BufferGraph, place: str) -> None:
    written: set[int] = set()
    for number, step in enumerate(graph.steps):
        if not written.issuperset(step.reads) or not set(step.reads).issuperset(step.overwrites):
            raise BundleError(f"{place}.steps[{number}]: it reads {list(step.reads)}, which is not all written before")
        if written.intersection(step.writes):
            raise BundleError(
                f"{place}.steps[{number}]: it writes {list(step.writes)}, of which some was written before"
            )
        written.update(step.writes)
    if written != set(range(len(graph.buffers))) or not written.issuperset(graph.outputs):
        raise BundleError(
            f"{place}: its steps write {len(written)} buffers, expected the {len(graph.buffers)} described"
        )
