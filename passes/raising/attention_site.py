"""Attention as it was found, and the `Attention` node that takes its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sdc.passes.matching import add_initializer, is_close, is_operator, replace_by_several, sole_consumer
from sdc.passes.raising.attention_operands import Operand, unscale_projection
from sdc.passes.raising.attention_scores import Scores
from sdc.passes.raising.causal_pattern import is_causal_mask

_SPLIT = (0, 2, 1, 3)
"""[B, S, heads, head_size] ↔ [B, heads, S, head_size]."""


@dataclass(frozen=True)
class AttentionSite:
    """Attention that is written as MatMul, Softmax and MatMul.

    Attributes:
        query: [B, h, S, d], or [B, S, d] for a single head; `key` and `value` likewise.
        scores: scale and mask.
        total: the MatMul that gives the result.
        output: the value to replace: of `total`, or of the Reshape that unfolds its heads.
    """

    query: Operand
    key: Operand
    value: Operand
    scores: Scores
    total: ir.Node
    output: ir.Value


def replace_by_attention(graph: ir.Graph, softmax: ir.Node, found: AttentionSite) -> bool:
    """Put an `Attention` in place of a site; whether it is causal."""
    dtype = found.scores.product.outputs[0].dtype
    size = found.query.sizes[-1]
    assert dtype is not None
    assert isinstance(size, int)
    new: list[ir.Node] = []
    query, key = unscale_projection(found.query, new), unscale_projection(found.key, new)
    operands: list[ir.Value | None] = [
        _attention_operand(graph, operand, dtype, new) for operand in (query, key, found.value)
    ]
    mask, causal = _mask(graph, found.scores, dtype, new)
    attributes: dict[str, float | int] = {"is_causal": 1} if causal else {}
    scale = found.scores.scale * query.scale * key.scale
    # Where numbers were halves on the way, the exporter's default is as inexact as they are.
    if not any(is_close(scale, size**-0.5, each) for each in {dtype, query.value.dtype, key.value.dtype}):
        attributes["scale"] = scale
    result = _append(new, "Attention", [*operands, *([mask] if mask is not None else [])], dtype, attributes)
    result.shape = ir.Shape(_rank_four(found.query.sizes[:-1], found.value.sizes[-1:]))
    attention = new[-1]
    if len(found.query.sizes) == 3:
        result = _merged_single_head(graph, result, found.value.sizes[-1], new)
    _take_over(found, result, new)
    attention.name = softmax.name
    return causal


def _take_over(found: AttentionSite, result: ir.Value, new: list[ir.Node]) -> None:
    """Put the new nodes in place; a conversion to the old result's type goes behind the merge of the heads."""
    output = found.output
    producer_of_output, dtype = output.producer(), output.dtype
    assert producer_of_output is not None
    assert dtype is not None
    if result.dtype != dtype:
        transpose = sole_consumer(output)
        merge = sole_consumer(transpose.outputs[0]) if is_operator(transpose, "Transpose") and transpose else None
        if transpose is not None and merge is not None and is_operator(merge, "Reshape"):
            for node in (transpose, merge):
                result = _append(new, node.op_type, [result, *node.inputs[1:]], result.dtype, node.attributes)
                result.shape = node.outputs[0].shape
            output = merge.outputs[0]
            producer_of_output = merge
        shape = result.shape
        result = _append(new, "Cast", [result], dtype, {"to": int(dtype)})
        result.shape = shape
    old = [found.total, *([producer_of_output] if producer_of_output is not found.total else [])]
    replace_by_several(old, new, [output], [result], at=producer_of_output)


def _rank_four(front: tuple[int | str | None, ...], last: tuple[int | str | None, ...]) -> list[int | str | None]:
    sizes = [*front, *last]
    return sizes if len(sizes) == 4 else [sizes[0], 1, *sizes[1:]]


def _append(
    new: list[ir.Node],
    op_type: str,
    inputs: Sequence[ir.Value | None],
    dtype: ir.DataType | None,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Value:
    """Add a node to `new`; its result, of element type `dtype`."""
    node = ir.node(op_type, inputs, attributes)
    node.outputs[0].type = None if dtype is None else ir.TensorType(dtype)
    new.append(node)
    return node.outputs[0]


def _number(graph: ir.Graph, number: float, dtype: ir.DataType) -> ir.Value:
    return add_initializer(graph, np.array(number, dtype.numpy()), "number")


def _attention_operand(graph: ir.Graph, operand: Operand, dtype: ir.DataType, new: list[ir.Node]) -> ir.Value:
    """The operand in rank 4 and the product's type; conversions stand in front of the head split."""
    value = operand.value
    if value.dtype != dtype:
        value = _converted(value, dtype, new)
    if operand.order is not None:
        value = _append(new, "Transpose", [value], dtype, {"perm": list(operand.order)})
        value.shape = ir.Shape(operand.sizes)
    if len(operand.sizes) == 3:
        size = operand.sizes[-1]
        target = add_initializer(graph, np.array([0, 0, 1, size], np.int64), "single_head")
        value = _append(new, "Reshape", [value, target], dtype)
        value.shape = ir.Shape([*operand.sizes[:2], 1, size])
        value = _append(new, "Transpose", [value], dtype, {"perm": list(_SPLIT)})
        value.shape = ir.Shape([operand.sizes[0], 1, *operand.sizes[1:]])
    return value


def _converted(value: ir.Value, dtype: ir.DataType, new: list[ir.Node]) -> ir.Value:
    """`value` in another type, by a conversion in front of the Reshape and Transpose that split its heads."""
    chain: list[ir.Node] = []
    source = value
    while (node := source.producer()) is not None and node.op_type in ("Transpose", "Reshape") and len(chain) < 2:
        chain.insert(0, node)
        assert node.inputs[0] is not None
        source = node.inputs[0]
    result = _append(new, "Cast", [source], dtype, {"to": int(dtype)})
    result.shape = source.shape
    for node in chain:
        result = _append(new, node.op_type, [result, *node.inputs[1:]], dtype, node.attributes)
        result.shape = node.outputs[0].shape
    return result


def _merged_single_head(graph: ir.Graph, result: ir.Value, size: int | str | None, new: list[ir.Node]) -> ir.Value:
    assert result.shape is not None
    batch, _, tokens, width = result.shape
    back = _append(new, "Transpose", [result], result.dtype, {"perm": list(_SPLIT)})
    back.shape = ir.Shape([batch, tokens, 1, width])
    target = add_initializer(graph, np.array([0, 0, size], np.int64), "merged_head")
    merged = _append(new, "Reshape", [back, target], result.dtype)
    merged.shape = ir.Shape([batch, tokens, width])
    return merged


def _mask(graph: ir.Graph, scores: Scores, dtype: ir.DataType, new: list[ir.Node]) -> tuple[ir.Value | None, bool]:
    """The operand that masks, and whether the mask is causal instead."""
    if scores.allowed is not None:
        condition = scores.allowed
        if is_causal_mask(condition, allows=scores.allowed_when):
            return None, True
        kept, hidden = _number(graph, 0.0, dtype), _number(graph, scores.fill, dtype)
        choices = (kept, hidden) if scores.allowed_when else (hidden, kept)
        return _append(new, "Where", [condition, *choices], dtype), False
    mask = scores.mask
    if mask is None:
        return None, False
    if is_causal_mask(mask):
        return None, True
    if mask.dtype not in (dtype, ir.DataType.BOOL):
        mask = _append(new, "Cast", [mask], dtype, {"to": int(dtype)})
    return mask, False
