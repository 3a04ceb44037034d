"""Makes an exported graph independent of how it was exported: names, free dimensions, metadata."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir
import sympy  # type: ignore[import-untyped]
from torch.onnx import ONNXProgram

from sdc.engines.specs import ComponentSpec

SCOPES = "pkg.torch.onnx.name_scopes"
WRAPPER = "network"
"""Attribute under which the traced wrappers hold the network itself."""


def tidy_export(program: ONNXProgram, spec: ComponentSpec) -> ir.Model:
    """The program's graph, changed in place, such that it depends on the network only.

    - Nodes are named after their module and operator, ``down_blocks.0.resnets.0.conv1/Conv``; weights after their
      parameter, also those that the exporter transposed (then of a ``MatMul``).
    - Free dimensions carry the interface's symbols; sizes inside the graph are expressions of them.
    - Traces of the exporting machine (source paths, class names) are gone.
    """
    model = program.model
    _name_dimensions(program, spec)
    _name_weights(model.graph)
    _name_nodes(model.graph)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name, model.producer_name, model.producer_version = spec.name, "sdc", None
    return model


def _name_dimensions(program: ONNXProgram, spec: ComponentSpec) -> None:
    """Express every size in the interface's symbols.

    The exporter writes a size such as ``8*s39`` with the symbols of its tracing, or of its options (``8*H_count``).
    """
    meanings: dict[str, sympy.Expr] = {}
    assert program.exported_program is not None
    placeholders = {node.name: node for node in program.exported_program.graph.nodes if node.op == "placeholder"}
    for value, tensor in zip(program.model.graph.inputs, spec.inputs, strict=True):
        traced = placeholders[tensor.name].meta["val"].shape
        for axis, symbol in enumerate(tensor.shape):
            if isinstance(symbol, str):
                multiple = spec.dimensions[symbol].multiple
                meaning = sympy.Symbol(symbol, integer=True, positive=True) / multiple
                inner = traced[axis].node.expr.free_symbols
                meanings |= {str(each): meaning for each in inner} | {f"{symbol}_count": meaning}
        value.shape = ir.Shape(tensor.shape)
    known: dict[str, str | None] = {}
    for node in program.model.graph.all_nodes():
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_express(size, meanings, known) for size in value.shape])
    for value, tensor in zip(program.model.graph.outputs, spec.outputs, strict=True):
        value.shape = ir.Shape(tensor.shape)


def _express(
    size: int | ir.SymbolicDim, meanings: Mapping[str, sympy.Expr], known: dict[str, str | None]
) -> int | str | None:
    """A size in the interface's symbols; None if it cannot be said. `known` keeps what was worked out before."""
    if isinstance(size, int):
        return size
    if size.value is None or not size.free_symbols() <= meanings.keys():
        return None
    if size.value not in known:
        expression = sympy.sympify(size.value)
        known[size.value] = str(expression.subs({each: meanings[str(each)] for each in expression.free_symbols}))
    return known[size.value]


def _module_of(node: ir.Node) -> str:
    """Path of the module that a node was traced in; "" for the network itself, or where nothing is known."""
    scopes = node.metadata_props.get(SCOPES)
    path: str = ast.literal_eval(scopes)[-2] if scopes else ""
    return path.removeprefix(WRAPPER).removeprefix(".") if path.startswith(WRAPPER) else ""


def _name_weights(graph: ir.Graph) -> None:
    taken = set(graph.initializers)
    for node in graph:
        for value in node.inputs:
            if value is None or not value.is_initializer() or value.shape is None:
                continue
            name = value.name or ""
            path = _module_of(node)
            if name.startswith(f"{WRAPPER}."):
                wanted = name.removeprefix(f"{WRAPPER}.")
            elif node.op_type == "MatMul" and len(value.shape) == 2 and path:
                wanted = f"{path}.weight"
            else:
                continue
            if wanted not in taken:
                taken.add(wanted)
                value.name = wanted


def _name_nodes(graph: ir.Graph) -> None:
    used: Counter[str] = Counter()
    for node in graph:
        path = _module_of(node)
        name = f"{path}/{node.op_type}" if path else node.op_type
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"
