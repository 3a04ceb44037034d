"""Recognises tensors that say "not after me": one value up to the diagonal and another behind it.

A mask is built in many ways: a constant, Trilu of ones, comparisons of Range with its own transpose, Where and Cast of
such. Here each is read as what it holds at row i and column j of its last two dimensions, which is enough to tell.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sdc.passes.matching import constant, dimensions
from sdc.passes.simplify.drop_neutral import uniform_value

HIDDEN = -1e4
"""From here down an additive mask hides: exp(-1e4) is 0 in every element type, and older exporters wrote -10000."""


@dataclass(frozen=True)
class _Levels:
    """A tensor that holds `inside` where j <= i, and `outside` where j > i."""

    inside: Any
    outside: Any


@dataclass(frozen=True)
class _Index:
    """A tensor that holds ``row * i + column * j + offset``."""

    row: int
    column: int
    offset: int


_Pattern = _Levels | _Index

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "And": lambda a, b: bool(a) and bool(b),
    "Or": lambda a, b: bool(a) or bool(b),
    "Not": operator.not_,
    "Where": lambda condition, a, b: a if condition else b,
    "Identity": lambda a: a,
    "Cast": lambda a: a,
}
_COMPARISONS = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual"})


def is_causal_mask(mask: ir.Value, *, allows: bool = True) -> bool:
    """Whether an attention mask hides exactly what stands behind the diagonal.

    Args:
        mask: a condition, or what is added to the scores.
        allows: of a condition: what it holds where a query may look.
    """
    pattern = _pattern(mask)
    if not isinstance(pattern, _Levels):
        return False
    if mask.dtype == ir.DataType.BOOL:
        return bool(pattern.inside) == allows != bool(pattern.outside)
    return bool(pattern.inside == 0 and pattern.outside <= HIDDEN)


def _pattern(value: ir.Value | None) -> _Pattern | None:
    uniform = uniform_value(value)
    if uniform is not None:
        return _Levels(uniform, uniform)
    array = constant(value)
    if array is not None:
        return _constant_pattern(array)
    node = None if value is None else value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type == "Range":
        bounds = [uniform_value(bound) for bound in (node.inputs[0], node.inputs[2])]
        return _Index(0, 1, 0) if bounds == [0.0, 1.0] else None
    if node.op_type == "Trilu":
        return _triangle(node, _pattern(node.inputs[0]))
    if node.op_type in ("Reshape", "Unsqueeze", "Expand", "Slice"):
        return _moved(node, _pattern(node.inputs[0]))
    if node.op_type not in _FUNCTIONS:
        return None
    operands = [_pattern(each) for each in node.inputs]
    return None if None in operands else _computed(node.op_type, operands)


def _constant_pattern(array: np.ndarray) -> _Levels | None:
    if array.ndim < 2 or any(size != 1 for size in array.shape[:-2]) or 1 in array.shape[-2:]:
        return None  # a single row or column is repeated over the scores, and then has no diagonal
    matrix = array.reshape(array.shape[-2], array.shape[-1])
    inside = np.unique(matrix[np.tril_indices_from(matrix)])
    outside = np.unique(matrix[np.triu_indices_from(matrix, 1)])
    return _Levels(inside[0].item(), outside[0].item()) if len(inside) == len(outside) == 1 else None


def _triangle(node: ir.Node, pattern: _Pattern | None) -> _Levels | None:
    """Source: ONNX Trilu: keeps the upper or lower triangle from diagonal k on, and zeros elsewhere."""
    diagonal = uniform_value(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else 0.0
    if not isinstance(pattern, _Levels):
        return None
    upper = node.attributes.get_int("upper", 1)
    if upper == 0 and diagonal == 0.0:
        return _Levels(pattern.inside, 0)
    return _Levels(0, pattern.outside) if upper == 1 and diagonal == 1.0 else None


def _moved(node: ir.Node, pattern: _Pattern | None) -> _Pattern | None:
    """A pattern behind an operator that moves or repeats elements."""
    old, new = dimensions(node.inputs[0]), dimensions(node.outputs[0])
    if pattern is None or not old or not new:
        return None
    if isinstance(pattern, _Levels) and pattern.inside == pattern.outside:
        return pattern
    if node.op_type == "Slice":
        narrowed = isinstance(pattern, _Levels) and 1 in new[-2:]
        return pattern if _from_the_start(node) and not narrowed else None
    if len(old) > 1 and old[-2:] == new[-2:]:
        return pattern
    if isinstance(pattern, _Levels) or pattern.row:
        return None
    if new[-1] == old[-1]:
        return pattern
    return _Index(pattern.column, 0, pattern.offset) if len(new) > 1 and new[-2:] == (old[-1], 1) else None


def _from_the_start(node: ir.Node) -> bool:
    starts = constant(node.inputs[1])
    steps_are_one = len(node.inputs) < 5 or uniform_value(node.inputs[4]) == 1.0
    return starts is not None and not starts.any() and steps_are_one


def _computed(op_type: str, operands: list[_Pattern | None]) -> _Pattern | None:
    if all(isinstance(operand, _Levels) for operand in operands):
        function = _FUNCTIONS[op_type]
        inside = function(*(operand.inside for operand in operands))  # type: ignore[union-attr]
        return _Levels(inside, function(*(operand.outside for operand in operands)))  # type: ignore[union-attr]
    indices = [_as_index(operand) for operand in operands]
    if any(index is None for index in indices):
        return None
    if len(indices) == 1:
        return indices[0] if op_type in ("Cast", "Identity") else None
    a, b = indices
    assert a is not None
    assert b is not None
    if op_type == "Add":
        return _Index(a.row + b.row, a.column + b.column, a.offset + b.offset)
    difference = _Index(a.row - b.row, a.column - b.column, a.offset - b.offset)
    if op_type == "Sub":
        return difference
    return _compared(op_type, difference) if op_type in _COMPARISONS else None


def _as_index(pattern: _Pattern | None) -> _Index | None:
    if isinstance(pattern, _Index) or pattern is None:
        return pattern
    number = pattern.inside
    return _Index(0, 0, int(number)) if number == pattern.outside and float(number).is_integer() else None


def _compared(op_type: str, index: _Index) -> _Levels | None:
    """``index < 0`` and its like, where that is the diagonal."""
    if (index.row, index.column) not in ((-1, 1), (1, -1)):
        return None
    # As a comparison of j - i with a bound.
    less = op_type.startswith("Less") == (index.column == 1)
    bound = -index.offset if index.column == 1 else index.offset
    strict = not op_type.endswith("OrEqual")
    if less:
        return _Levels(True, False) if bound == (1 if strict else 0) else None
    return _Levels(False, True) if bound == (0 if strict else 1) else None
