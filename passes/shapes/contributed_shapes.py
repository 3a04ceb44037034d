"""Shapes of results of ONNX Runtime's own operators, of which ONNX's inference knows nothing.

Source: ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from sdc.passes.shapes.shape_rules import Shape, conv_shape, known_shape
from sdc.passes.shapes.sizes import divide

_DOMAIN = "com.microsoft"

_LIKE_THE_FIRST = frozenset({"BiasAdd", "GroupNorm", "QuickGelu", "SkipGroupNorm", "SkipLayerNormalization"})
"""Operators whose results, the omitted ones aside, all have the shape of the first operand."""


def contributed_shape(node: ir.Node, index: int) -> Shape | None:
    """Shape of output `index`; None where the operator, or what it needs to be known, is unknown."""
    if node.domain != _DOMAIN:
        return None
    if node.op_type in _LIKE_THE_FIRST:
        return known_shape(node.inputs[0])
    rule = _RULES.get(node.op_type)
    return None if rule is None or index else rule(node)


def _product(node: ir.Node) -> Shape | None:
    rows, matrix = known_shape(node.inputs[0]), known_shape(node.inputs[1])
    return None if rows is None or matrix is None or len(matrix) != 2 else (*rows[:-1], matrix[1])


def _attention(node: ir.Node) -> Shape | None:
    query, value = known_shape(node.inputs[0]), known_shape(node.inputs[2])
    if query is None or value is None or (len(query), len(value)) != (3, 3):
        return None
    return (*query[:2], value[2])


def _half_the_channels(node: ir.Node) -> Shape | None:
    x = known_shape(node.inputs[0])
    return None if x is None or x[-1] is None else (*x[:-1], divide(x[-1], 2))


def _channels_last_conv(node: ir.Node) -> Shape | None:
    x, weight = known_shape(node.inputs[0]), known_shape(node.inputs[1])
    if x is None or weight is None:
        return None
    first = conv_shape(node, (x[0], x[-1], *x[1:-1]), (weight[0], weight[-1], *weight[1:-1]))
    return None if first is None else (first[0], *first[2:], first[1])


_RULES: dict[str, Callable[[ir.Node], Shape | None]] = {
    "BiasSplitGelu": _half_the_channels,
    "MatMulIntegerToFloat": _product,
    "MultiHeadAttention": _attention,
    "NhwcConv": _channels_last_conv,
}
