"""Shapes of operators' results where ONNX's own inference gives up: free sizes that are computed with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from sdc.passes.shapes.size_contents import Contents
from sdc.passes.shapes.sizes import Size, add_up, broadcast_sizes, clamped, divide, normal_size, product

Shape = tuple[Size | None, ...]
"""None is an unknown size."""

_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Mod", "Where", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
    | {"And", "Or", "Xor", "Min", "Max"}
)
_TO_THE_END = 2**31 - 1
"""Source: ONNX Slice: "for slicing to the end of a dimension with unknown size, it is recommended to pass in
INT_MAX"."""


@dataclass(frozen=True)
class _Call:
    """A node with what is known of its operands: their shapes and, of integer tensors, their contents."""

    node: ir.Node
    shapes: Sequence[Shape | None]
    values: Sequence[Contents | None]


def known_shape(value: ir.Value | None) -> Shape | None:
    """Shape of `value` in normal form; None if not even its rank is known."""
    return None if value is None or value.shape is None else tuple(map(normal_size, value.shape))


def whole_shape(value: ir.Value | None) -> tuple[Size, ...] | None:
    """Likewise, None if any size is unknown."""
    shape = known_shape(value)
    sizes = tuple(size for size in shape or () if size is not None)
    return None if shape is None or len(sizes) < len(shape) else sizes


def result_shape(node: ir.Node, contents: Mapping[ir.Value, Contents]) -> Shape | None:
    """Shape of the first output by this module's rules; None where they do not apply.

    Args:
        node: a standard operator.
        contents: of integer tensors, as far as they are known.
    """
    shapes = [known_shape(value) for value in node.inputs]
    if node.op_type in _ELEMENTWISE:
        return None if any(shape is None for shape in shapes) else broadcast_sizes(shapes)  # type: ignore[arg-type]
    rule = _RULES.get(node.op_type)
    if rule is None:
        return None
    values = [None if value is None else contents.get(value) for value in node.inputs]
    return rule(_Call(node, shapes, values))


def _conv(call: _Call) -> Shape | None:
    x, weight = call.shapes[:2]
    return None if x is None or weight is None else conv_shape(call.node, x, weight)


def conv_shape(node: ir.Node, x: Shape, weight: Shape) -> Shape | None:
    """Shape of a convolution's result, [B, M, spatial...]; None if its padding is not explicit.

    Args:
        node: for its attributes.
        x: [B, C, spatial...].
        weight: [M, C, kernel...].
    """
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    rank = len(x) - 2
    strides = node.attributes.get_ints("strides", [1] * rank)
    dilations = node.attributes.get_ints("dilations", [1] * rank)
    pads = node.attributes.get_ints("pads", [0] * 2 * rank)
    sizes: list[Size | None] = [x[0], weight[0]]
    for axis in range(rank):
        size, kernel = x[2 + axis], weight[2 + axis]
        if size is None or not isinstance(kernel, int):
            sizes.append(None)
            continue
        # Source: ONNX Conv (and Dumoulin & Visin, arXiv:1603.07285, relationship 14).
        covered = pads[axis] + pads[axis + rank] - dilations[axis] * (kernel - 1) - 1
        sizes.append(add_up(add_up(size + covered) // strides[axis] + 1))
    return tuple(sizes)


def _conv_transpose(call: _Call) -> Shape | None:
    node, (x, weight) = call.node, call.shapes[:2]
    if x is None or weight is None or weight[1] is None or "output_shape" in node.attributes:
        return None
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    rank = len(x) - 2
    strides, dilations = (node.attributes.get_ints(name, [1] * rank) for name in ("strides", "dilations"))
    pads = node.attributes.get_ints("pads", [0] * 2 * rank)
    behind = node.attributes.get_ints("output_padding", [0] * rank)
    sizes: list[Size | None] = [x[0], product([weight[1], node.attributes.get_int("group", 1)])]
    for axis in range(rank):
        size, kernel = x[2 + axis], weight[2 + axis]
        if size is None or not isinstance(kernel, int):
            sizes.append(None)
            continue
        # Source: ONNX ConvTranspose.
        reach = behind[axis] + (kernel - 1) * dilations[axis] + 1 - pads[axis] - pads[axis + rank]
        sizes.append(add_up(add_up(size - 1) * strides[axis] + reach))
    return tuple(sizes)


def _reshape(call: _Call) -> Shape | None:
    old, target = call.shapes[0], call.values[1]
    if target is None:
        return None
    new: list[Size | None] = list(target)
    if call.node.attributes.get_int("allowzero", 0) == 0:
        new = [(old[axis] if old is not None else None) if size == 0 else size for axis, size in enumerate(new)]
    if -1 in new:
        rest = [size for size in new if size != -1]
        open_axis = new.index(-1)
        new[open_axis] = None
        if old is not None and None not in old and None not in rest:
            new[open_axis] = _divided(old, rest)  # type: ignore[arg-type]
    return tuple(new)


def _divided(old: Sequence[Size], rest: Sequence[Size]) -> Size | None:
    """What a Reshape's -1 stands for; sizes that both sides share are crossed out first."""
    remaining = list(old)
    divisors = []
    for size in rest:
        if size in remaining:
            remaining.remove(size)
        else:
            divisors.append(size)
    divisor = product(divisors)
    return None if divisor == 0 else divide(product(remaining), divisor)


def _expand(call: _Call) -> Shape | None:
    if call.shapes[0] is None or call.values[1] is None:
        return None
    return broadcast_sizes([call.shapes[0], tuple(call.values[1])])


def _constant_of_shape(call: _Call) -> Shape | None:
    return None if call.values[0] is None else tuple(call.values[0])


def _range(call: _Call) -> Shape | None:
    if any(value is None for value in call.values) or call.values[2].item() != 1:  # type: ignore[union-attr]
        return None
    return (add_up(call.values[1].item() - call.values[0].item()),)  # type: ignore[union-attr]


def _slice(call: _Call) -> Shape | None:
    shape, bounds = call.shapes[0], call.values[1:]
    if shape is None or any(bound is None for bound in bounds):
        return None
    starts, ends, *rest = (list(bound.flat) for bound in bounds)  # type: ignore[union-attr]
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    sizes: list[Any] = list(shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        sizes[axis] = _sliced(shape[axis], start, end, step)
    return tuple(sizes)


def _sliced(size: Size | None, start: Any, end: Any, step: Any) -> Size | None:
    if size is None or not isinstance(step, int) or step < 1:
        return None
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(size)[start:end:step])
    if isinstance(start, int) and start == 0 and not isinstance(end, int) and step == 1:
        return size if end == size else clamped(end, size) if isinstance(size, int) else None
    if not isinstance(start, int) or start < 0 or not isinstance(end, int):
        return None
    # A free size is taken to be no smaller than what is cut off at both ends.
    if end >= _TO_THE_END:
        return add_up(add_up(size - start + step - 1) // step)
    return add_up(add_up(size + end - start + step - 1) // step) if end < 0 else None


def _like_the_first(call: _Call) -> Shape | None:
    return call.shapes[0]


def _concat(call: _Call) -> Shape | None:
    if any(shape is None for shape in call.shapes):
        return None
    columns = list(zip(*call.shapes, strict=True))
    axis = call.node.attributes["axis"].as_int() % len(columns)
    # Off the axis all sizes are equal; the one that says most is taken.
    sizes = [
        next((s for s in column if isinstance(s, int)), next((s for s in column if s is not None), None))
        for column in columns
    ]
    total: Size | None = 0
    for size in columns[axis]:
        total = None if total is None or size is None else add_up(total + size)
    sizes[axis] = total
    return tuple(sizes)


def _flatten(call: _Call) -> Shape | None:
    shape, axis = call.shapes[0], call.node.attributes.get_int("axis", 1)
    if shape is None or None in shape:
        return None
    axis += len(shape) if axis < 0 else 0
    return product(shape[:axis]), product(shape[axis:])  # type: ignore[arg-type]


def _resize(call: _Call) -> Shape | None:
    shape = call.shapes[0]
    if shape is None or "axes" in call.node.attributes:
        return None
    if len(call.values) > 3 and call.values[3] is not None:
        return tuple(call.values[3])
    scales = call.node.inputs[2].const_value if len(call.node.inputs) > 2 and call.node.inputs[2] is not None else None
    if scales is None or scales.size != len(shape):
        return None
    factors = scales.numpy().tolist()
    if not all(float(factor).is_integer() for factor in factors):
        return None
    return tuple(
        None if size is None else add_up(size * int(factor)) for size, factor in zip(shape, factors, strict=True)
    )


def _pad(call: _Call) -> Shape | None:
    shape, pads = call.shapes[0], call.values[1]
    if shape is None or pads is None or len(pads) != 2 * len(shape):
        return None
    rank = len(shape)
    return tuple(
        None if size is None else add_up(size + pads[axis] + pads[axis + rank]) for axis, size in enumerate(shape)
    )


def _depth_to_space(call: _Call) -> Shape | None:
    shape, block = call.shapes[0], call.node.attributes.get_int("blocksize")
    if shape is None or len(shape) != 4 or block is None:
        return None
    batch, channels, *image = shape
    depth = None if channels is None else divide(channels, block * block)
    return batch, depth, *(None if size is None else add_up(size * block) for size in image)


_RULES: dict[str, Callable[[_Call], Shape | None]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Reshape": _reshape,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Slice": _slice,
    "Concat": _concat,
    "Flatten": _flatten,
    "Resize": _resize,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    # ONNX infers nothing through the first (it is a function), and through the others only with their types.
    "GroupNormalization": _like_the_first,
    "QuantizeLinear": _like_the_first,
    "DequantizeLinear": _like_the_first,
}
