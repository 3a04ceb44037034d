"""Compute in float32 what is stored in float16."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.base import Pass, PassReport
from sdc.passes.matching import consumers, is_operator
from sdc.passes.precision.cast_half import DTYPE_ATTRIBUTES, cast_of, check_convertible
from sdc.passes.precision.half_tensors import EXACT_CONSTANT
from sdc.passes.simplify.fold_constants import FoldConstants

_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_SCALED = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MOST_SMALL_ELEMENTS = FoldConstants.input_size_limit
"""Constants of no more elements are kept in float32: all biases, and what would be folded anyway."""


@dataclass(frozen=True)
class WidenFp16(Pass):
    """Float16 inside the graph becomes float32; large weights stay in float16 where they are stored.

    Before → after, f in float16 before and in float32 after::

        y = f(x, w)                       →  y = f(x, Cast(w, float32))
        y = f(Cast(x, float16)), x float32  →  y = f(Cast(x, float32)), which is no operator

    ONNX Runtime's CPU provider has no kernels for float16. It casts around every operator, and of these casts only
    those of constants are gone once the engine is loaded; patterns of operators are not recognised between them.

    1. A small constant, and the scales of Q/DQ, become float32: the values that they were rounded from, where those are
       known. Larger ones are cast once for all that reads them.
    2. Rows of a table are cast when a Gather has picked them.
    3. Operators that name the type of their result name float32.
    4. Inputs and outputs of the graph keep their type, behind a cast.

    Preconditions are those of `CastHalf`: no functions outside of domain `sdc`, no subgraphs.

    Not matched: bfloat16, which this provider does not run at all.

    Source: ONNX Runtime 1.31, profiles of SD 1.5's VAE decoder.
    """

    name: ClassVar[str] = "widen-fp16"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Widen the whole graph; the match count is the number of values of nodes that were float16.

        Raises:
            PassError: a precondition does not hold.
        """
        check_convertible(model, self.name)
        graph = model.graph
        kept = [node for node in graph if _casts_output(node) or _picks_stored_rows(node)]
        inside = [node for node in graph if node not in kept]
        for node in inside:
            _name_float32(node)
        written = {value for node in inside for value in node.outputs if value.dtype == _HALF}
        for value in written:
            value.type = ir.TensorType(_SINGLE)  # not shared with another value
        constants = [value for value in graph.initializers.values() if value.dtype == _HALF]
        small = [value for value in constants if _is_small(value)]
        for value in small:
            _widen(value)
        stored = [value for value in constants if value.dtype == _HALF]
        inputs = [value for value in graph.inputs if value.dtype == _HALF]
        for value in (*stored, *inputs, *(node.outputs[0] for node in kept)):
            if value.dtype == _HALF:
                _cast_for_readers(graph, value)
        _cast_outputs(graph, written)
        return PassReport(self.name, len(written), details={"stored": len(stored), "constants": len(small)})


def _casts_output(node: ir.Node) -> bool:
    """Whether an output of the graph is its other values in another type."""
    return is_operator(node, "Cast") and node.outputs[0].is_graph_output()


def _picks_stored_rows(node: ir.Node) -> bool:
    table = node.inputs[0] if is_operator(node, "Gather") else None
    return table is not None and table.is_initializer() and table.dtype == _HALF and not _is_small(table)


def _name_float32(node: ir.Node) -> None:
    name = DTYPE_ATTRIBUTES.get(node.op_type, "") if node.domain == "" else ""
    if name in node.attributes and node.attributes.get_int(name) == _HALF:
        node.attributes[name] = ir.AttrInt64(name, _SINGLE)
    if node.op_type == "ConstantOfShape" and node.outputs[0].dtype == _HALF:
        node.attributes["value"] = ir.AttrTensor("value", _widened(node.attributes["value"].as_tensor()))


def _is_small(value: ir.Value) -> bool:
    """Whether a constant becomes float32: a small one or scales, but no output of the graph."""
    assert value.const_value is not None
    is_scale = any(node.op_type in _SCALED and index == 1 for node, index in value.uses())
    return (is_scale or value.const_value.size <= _MOST_SMALL_ELEMENTS) and not value.is_graph_output()


def _widen(value: ir.Value) -> None:
    assert value.const_value is not None
    exact = value.meta.get(EXACT_CONSTANT)
    value.const_value = _widened(value.const_value if exact is None else exact)
    value.type = ir.TensorType(_SINGLE)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(_SINGLE.numpy()), name=tensor.name)


def _cast_for_readers(graph: ir.Graph, value: ir.Value) -> None:
    """Let all that reads a value read it in float32, but what casts it or picks rows of it."""
    readers = [node for node in consumers(value) if not is_operator(node, "Cast") and not _picks_stored_rows(node)]
    if not readers:
        return
    cast = cast_of(value, _SINGLE)
    for node in readers:
        for index, operand in enumerate(node.inputs):
            if operand is value:
                node.replace_input_with(index, cast.outputs[0])
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], cast)
    else:
        graph.insert_after(producer, cast)


def _cast_outputs(graph: ir.Graph, written: Collection[ir.Value]) -> None:
    """Give outputs of the graph that were float16 their type back, under their names."""
    casts: dict[ir.Value, ir.Value] = {}
    for index, value in enumerate(graph.outputs):
        producer, name = value.producer(), value.name
        if producer is None or value not in written:
            continue
        if value not in casts:
            cast = cast_of(value, _HALF)
            value.name, cast.outputs[0].name = f"{name}.float", name
            graph.insert_after(producer, cast)
            casts[value] = cast.outputs[0]
        graph.outputs[index] = casts[value]
