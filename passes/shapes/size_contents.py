"""What integer tensors hold that are computed from sizes: shape arithmetic with free sizes left as symbols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sdc.passes.shapes.sizes import Size, add_up, normal_size, product

Contents = np.ndarray
"""Array of objects, each an int, a bool or a SymbolicDim."""

_LIMIT = 64
"""Largest tensor to follow, in elements: shapes, axes and bounds of slices are small."""

_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})


@dataclass(frozen=True)
class _Call:
    """A node, the contents of its operands, and the shape of its result."""

    node: ir.Node
    operands: Sequence[Any]
    shape: tuple[Size, ...]


def initial_contents(value: ir.Value) -> Contents | None:
    """Contents of a small integer initialiser."""
    tensor = value.const_value
    if tensor is None or value.is_graph_input() or tensor.dtype not in _INTEGERS or tensor.size > _LIMIT:
        return None
    return tensor.numpy().astype(object)


def computed_contents(node: ir.Node, known: Mapping[ir.Value, Contents], shape: Sequence[Size]) -> Contents | None:
    """Contents of the first output of `node`, or None where they are not known.

    Args:
        node: a standard operator.
        known: contents of its operands.
        shape: of the first output.
    """
    if node.op_type == "Shape":
        return _shape_contents(node)
    rule = _RULES.get(node.op_type)
    if rule is None or not all(isinstance(size, int) for size in shape) or product(shape) > _LIMIT:  # type: ignore[operator]
        return None
    operands = [None if value is None else known.get(value) for value in node.inputs]
    if not operands or operands[0] is None or (node.op_type != "Reshape" and any(each is None for each in operands)):
        return None
    result = rule(_Call(node, operands, tuple(shape)))
    return None if result is None else result.reshape(tuple(shape))  # type: ignore[arg-type]


def _shape_contents(node: ir.Node) -> Contents | None:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    sizes = [normal_size(size) for size in value.shape]
    sizes = sizes[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(sizes))]
    return None if any(size is None for size in sizes) else _array(sizes)


def _array(sizes: Sequence[Any]) -> Contents:
    array = np.empty(len(sizes), dtype=object)
    array[:] = sizes
    return array


def _map(function: Callable[..., Any], *operands: Contents) -> Contents | None:
    """An element-wise operation; None if it is undecided for an element."""
    broadcast = np.broadcast_arrays(*operands)
    results = [function(*elements) for elements in zip(*(each.flat for each in broadcast), strict=True)]
    return None if any(each is None for each in results) else _array(results)


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else int(a / b)  # Source: ONNX Div truncates integers
    return None if isinstance(a, int) else add_up(a // b)  # sizes are not negative: truncation is rounding down


def _equal(a: Any, b: Any) -> bool | None:
    if a == b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    constant = a if isinstance(a, int) else b
    # A size is never negative; whether two different expressions meet is open.
    return False if isinstance(constant, int) and constant < 0 else None


def _where(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


def _gather(call: _Call) -> Contents | None:
    data, indices = call.operands
    if not all(isinstance(index, int) for index in indices.flat):
        return None
    return np.asarray(
        np.take(data, indices.astype(np.int64), axis=call.node.attributes.get_int("axis", 0)), dtype=object
    )


def _slice(call: _Call) -> Contents | None:
    data, *bounds = call.operands
    if not all(isinstance(bound, int) for each in bounds for bound in each.flat):
        return None
    starts, ends, *rest = ([int(bound) for bound in each] for each in bounds)
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    region = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # Source: ONNX Slice: backwards, an end before the first element means "to the first element".
        to_first = step < 0 and end < -data.shape[axis]
        region[axis] = slice(start, None if to_first else end, step)
    return np.asarray(data[tuple(region)], dtype=object)


def _same(call: _Call) -> Contents | None:
    return call.operands[0]  # type: ignore[no-any-return]


def _constant_of_shape(call: _Call) -> Contents | None:
    fill = (
        call.node.attributes["value"].as_tensor().numpy()
        if "value" in call.node.attributes
        else np.zeros(1, np.float32)
    )
    if fill.dtype.kind not in "iub":
        return None
    return np.full(call.shape, int(fill.flat[0]), dtype=object)  # type: ignore[arg-type]


def _cast(call: _Call) -> Contents | None:
    return call.operands[0] if call.node.attributes.get_int("to", 0) in (ir.DataType.INT64, ir.DataType.INT32) else None


def _range(call: _Call) -> Contents | None:
    bounds = [each.item() for each in call.operands]
    return _array(list(range(*bounds))) if all(isinstance(bound, int) for bound in bounds) else None


def _add(a: Any, b: Any) -> Size:
    return add_up(a + b)


def _subtract(a: Any, b: Any) -> Size:
    return add_up(a - b)


def _multiply(a: Any, b: Any) -> Size:
    return add_up(a * b)


_RULES: dict[str, Callable[[_Call], Contents | None]] = {
    "Gather": _gather,
    "Slice": _slice,
    "Concat": lambda call: np.concatenate(call.operands),
    "Unsqueeze": _same,
    "Squeeze": _same,
    "Reshape": _same,
    "Transpose": lambda call: np.transpose(
        call.operands[0], call.node.attributes.get_ints("perm", range(call.operands[0].ndim)[::-1])
    ),
    "Identity": _same,
    "Expand": lambda call: np.broadcast_to(call.operands[0], call.shape),  # type: ignore[arg-type]
    "Cast": _cast,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Add": lambda call: _map(_add, *call.operands),
    "Sub": lambda call: _map(_subtract, *call.operands),
    "Mul": lambda call: _map(_multiply, *call.operands),
    "Div": lambda call: _map(_divide, *call.operands),
    "Equal": lambda call: _map(_equal, *call.operands),
    "Where": lambda call: _map(_where, *call.operands),
}
