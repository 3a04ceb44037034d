"""Compute in float32 what is stored in float16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.base import Pass, PassReport
from sdc.passes.matching import consumers, is_operator
from sdc.passes.precision.cast_half import DTYPE_ATTRIBUTES, check_convertible
from sdc.passes.precision.half_tensors import EXACT_CONSTANT

_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_SCALED = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MOST_SMALL_ELEMENTS = 8192
"""Constants of no more elements are kept in float32: all biases, and what `FoldConstants` would cast anyway."""


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
        inside = [node for node in graph if not _casts_output(node) and not _picks_stored_rows(node)]
        for node in inside:
            _name_float32(node)
        written = {value for node in inside for value in node.outputs if value.dtype == _HALF}
        for value in written:
            value.type = ir.TensorType(_SINGLE)  # not shared with another value
        constants = [value for value in graph.initializers.values() if value.dtype == _HALF]
        stored = [value for value in constants if not _widen_small(value)]
        inputs = [value for value in graph.inputs if value.dtype == _HALF]
        rows = [node.outputs[0] for node in graph if _picks_stored_rows(node)]
        for value in (*stored, *inputs, *rows):
            _cast_for_readers(graph, value)
        for index, value in enumerate(graph.outputs):
            if value in written:
                _cast_output(graph, index, value)
        details = {"stored": len(stored), "constants": len(constants) - len(stored)}
        return PassReport(self.name, len(written), details=details)


def _casts_output(node: ir.Node) -> bool:
    """Whether an output of the graph is its other values in float16."""
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


def _widen_small(value: ir.Value) -> bool:
    """Whether a constant is small, and was given its values in float32."""
    if not _is_small(value):
        return False
    assert value.const_value is not None
    exact = value.meta.get(EXACT_CONSTANT)
    value.const_value = _widened(value.const_value if exact is None else exact)
    value.type = ir.TensorType(_SINGLE)
    return True


def _is_small(value: ir.Value) -> bool:
    assert value.const_value is not None
    is_scale = any(node.op_type in _SCALED for node in value.consumers())
    return is_scale or value.const_value.size <= _MOST_SMALL_ELEMENTS


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(_SINGLE.numpy()), name=tensor.name)


def _cast_for_readers(graph: ir.Graph, value: ir.Value) -> None:
    """Let all that reads a value read it in float32, but what casts it or picks rows of it."""
    readers = [node for node in consumers(value) if not is_operator(node, "Cast") and not _picks_stored_rows(node)]
    if not readers:
        return
    cast = ir.node("Cast", [value], {"to": _SINGLE.value})
    cast.outputs[0].name = f"{value.name}.float"
    cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, _SINGLE
    for node in readers:
        for index, operand in enumerate(node.inputs):
            if operand is value:
                node.replace_input_with(index, cast.outputs[0])
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], cast)
    else:
        graph.insert_after(producer, cast)


def _cast_output(graph: ir.Graph, index: int, value: ir.Value) -> None:
    """Give an output of the graph its type back, under its name."""
    producer, name = value.producer(), value.name
    assert producer is not None
    value.name = f"{name}.float"
    cast = ir.node("Cast", [value], {"to": _HALF.value})
    cast.outputs[0].name = name
    cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, _HALF
    graph.insert_after(producer, cast)
    graph.outputs[index] = cast.outputs[0]
