"""Whether a node treats the rows of its first axis alike and apart, so that equal rows need be computed only once."""

from __future__ import annotations

import math
from collections.abc import Callable, Set

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.matching import constant, dimensions

BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div", "Sum", "Pow", "Min", "Max", "Where"})
"""Operators whose operands are broadcast to each other."""

_ELEMENTWISE = BROADCASTING | {
    "Abs",
    "Cast",
    "Cos",
    "DequantizeLinear",
    "Erf",
    "Exp",
    "Gelu",
    "Identity",
    "Log",
    "Neg",
    "QuantizeLinear",
    "Reciprocal",
    "Relu",
    "Sigmoid",
    "Sin",
    "Sqrt",
    "Tanh",
}


def mixes_rows(node: ir.Node, one_row: Set[ir.Value]) -> str | None:
    """Why `node` may not be given a single row where it was given equal rows along axis 0; None if it may.

    1. It is elementwise. Operands of one row have as many axes as the result; constants are the same for all rows.
    2. It is Concat of such values alone, Split, Slice, Squeeze, Unsqueeze, Transpose, Flatten or Reshape, and leaves
       axis 0 alone.
    3. It is Gemm or MatMul, and the rows are those of its first operand.

    Args:
        node: any node; at least one of its operands is in `one_row`.
        one_row: values whose rows are all equal and come as one.
    """
    if _is_elementwise(node):
        return _check_broadcast(node, one_row)
    refusal = f"{node.op_type} may mix the rows of a batch"
    check = None if node.domain else _CHECKS.get(node.op_type)
    if check is None or not check(node):
        return refusal
    rows = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    others = node.inputs[len(rows) :]
    alike = all(value in one_row for value in rows) and not any(value in one_row for value in others)
    return None if alike else refusal


def gives_one_row(node: ir.Node, one_row: Set[ir.Value]) -> bool:
    """Whether a node that `mixes_rows` lets pass gives one row as well; broadcasting may give it more."""
    if not _is_elementwise(node):
        return True
    values = [value for value in node.inputs if value is not None]
    rank = max(_rank(value) for value in values)
    return all(value in one_row or _rank(value) < rank or _first(value) == 1 for value in values)


def _is_elementwise(node: ir.Node) -> bool:
    return domain.is_fused(node, domain.SILU) or (not node.domain and node.op_type in _ELEMENTWISE)


def _check_broadcast(node: ir.Node, one_row: Set[ir.Value]) -> str | None:
    values = [value for value in node.inputs if value is not None]
    if any(value.shape is None for value in values):
        return f"the rank of an operand of {node.op_type} is unknown"
    rank = max(map(_rank, values))
    for value in values:
        if value in one_row:
            if _rank(value) != rank:
                return f"{node.op_type} broadcasts rows along another axis"
        elif is_constant(value) and _rank(value) == rank and _first(value) != 1:
            return f"{node.op_type} has a constant for each row"
    return None


def is_constant(value: ir.Value) -> bool:
    """Whether `value` is an initialiser or the result of a Constant; its contents are not read."""
    return ir.convenience.get_const_tensor(value) is not None


def _axis_is_kept(node: ir.Node) -> bool:
    rank = _rank(node.inputs[0])
    return rank > 0 and node.attributes.get_int("axis", 0) % rank != 0


def _axes_are_kept(node: ir.Node, index: int, rank: int) -> bool:
    axes = constant(node.inputs[index]) if len(node.inputs) > index else None
    return axes is not None and rank > 0 and all(int(axis) % rank for axis in axes.reshape(-1))


def _reshape_keeps(node: ir.Node) -> bool:
    shape, before = constant(node.inputs[1]), dimensions(node.inputs[0])
    if shape is None or not before or shape.size == 0:
        return False
    if int(shape[0]) == 0:
        return node.attributes.get_int("allowzero", 0) == 0
    rest = [size for size in before[1:] if isinstance(size, int)]
    # With all other sizes known, -1 can only be the rows.
    return int(shape[0]) == -1 and len(rest) == len(before) - 1 and math.prod(rest) == math.prod(map(int, shape[1:]))


def _gemm_keeps(node: ir.Node) -> bool:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    one_row = bias is None or (bias.shape is not None and (_rank(bias) < 2 or bias.shape[0] == 1))
    return node.attributes.get_int("transA", 0) == 0 and one_row


def _matmul_keeps(node: ir.Node) -> bool:
    return _rank(node.inputs[0]) >= 2 and _rank(node.inputs[1]) == 2


def _rank(value: ir.Value | None) -> int:
    """Number of axes; 0 if unknown."""
    return 0 if value is None or value.shape is None else len(value.shape)


def _first(value: ir.Value) -> object:
    """Size of axis 0; 1 if there is no axis."""
    return 1 if not value.shape else value.shape[0]


_CHECKS: dict[str, Callable[[ir.Node], bool]] = {
    "Concat": _axis_is_kept,
    "Flatten": lambda node: node.attributes.get_int("axis", 1) == 1,
    "Gemm": _gemm_keeps,
    "MatMul": _matmul_keeps,
    "Reshape": _reshape_keeps,
    "Slice": lambda node: _axes_are_kept(node, 3, _rank(node.inputs[0])),
    "Split": _axis_is_kept,
    "Squeeze": lambda node: _axes_are_kept(node, 1, _rank(node.inputs[0])),
    "Transpose": lambda node: next(iter(node.attributes.get_ints("perm", [-1]))) == 0,
    "Unsqueeze": lambda node: _axes_are_kept(node, 1, _rank(node.outputs[0])),
}
