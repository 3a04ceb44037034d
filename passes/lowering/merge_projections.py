"""Compute queries, keys and values of self-attention in one MatMul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.lowering.weight_slices import LinearWeight, match_linear_weight
from sdc.passes.mapped_tensors import release
from sdc.passes.matching import producer, site, sole_consumer


@dataclass(frozen=True)
class MergeProjections(Pass):
    """Three projections of one input become one, whose result is split.

    Before → after, with w = [wq, wk, wv] side by side::

        q = MatMul(x, wq), k = MatMul(x, wk), v = MatMul(x, wv); y = sdc.MultiHeadAttention(q, k, v)
            →  q, k, v = Split(MatMul(x, w), axis=-1); y = sdc.MultiHeadAttention(q, k, v)

    Whether it pays depends on the target: on ONNX Runtime's CPU provider it is two kernels instead of three in no more
    time, for OpenVINO it is slower. Weights are joined when they are written, so that they are not held twice.

    Preconditions:

    1. The three operands are MatMuls of one input that nothing but the attention reads.
    2. The weights are matrices in floating point, of one element type, and nothing else reads them.

    Not matched: cross-attention; projections with a bias; quantised weights, whose MatMuls are integers' work already.
    """

    name: ClassVar[str] = "merge-projections"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Merge at all sites; an attention without three MatMuls of one input is no candidate."""
        matched = 0
        skipped: list[Skipped] = []
        for attention in [node for node in model.graph if domain.is_fused(node, domain.MULTI_HEAD_ATTENTION)]:
            products = [producer(value, "MatMul") for value in attention.inputs[:3]]
            if len({None if each is None else each.inputs[0] for each in products}) != 1 or None in products:
                continue
            found = [each for each in products if each is not None]
            weights = [match_linear_weight(each.inputs[1]) for each in found]
            if reason := _reason_against(attention, found, weights):
                skipped.append(Skipped(site(attention), reason))
                continue
            _merge(model.graph, found, [each.stored for each in weights if each is not None])
            matched += 1
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))


def _reason_against(attention: ir.Node, products: list[ir.Node], weights: list[LinearWeight | None]) -> str | None:
    if any(sole_consumer(each.outputs[0]) is not attention for each in products) or len(set(products)) != 3:
        return "something besides the attention reads a projection"
    if any(each is None or each.dequantise is not None for each in weights):
        return "a weight is no matrix of its own in floating point"
    if len({each.stored.dtype for each in weights if each is not None}) != 1:
        return "the weights have several element types"
    return None


def _merge(graph: ir.Graph, products: list[ir.Node], weights: list[ir.Value]) -> None:
    first = products[0]
    shapes = [weight.shape.numpy() for weight in weights if weight.shape is not None]
    widths = [int(shape[1]) for shape in shapes]
    weight = _joined(graph, weights, (int(shapes[0][0]), sum(widths)))
    sizes = ir.tensor(np.array(widths, np.int64), name=f"{weight.name}.widths")
    size = ir.Value(name=sizes.name, shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.INT64), const_value=sizes)
    graph.register_initializer(size)
    product = ir.node("MatMul", [first.inputs[0], weight], name=f"{first.name}.merged")
    output, old = product.outputs[0], first.outputs[0]
    output.name, output.type = f"{old.name}.merged", old.type
    if old.shape is not None:
        output.shape = ir.Shape([*old.shape[:-1], sum(widths)])
    split = ir.node("Split", [output, size], {"axis": -1}, num_outputs=3, name=f"{first.name}.split")
    # The first of the three in the graph's order stands before every reader.
    place = min(products, key=list(graph).index)
    outputs = [each.outputs[0] for each in products]
    ir.convenience.replace_nodes_and_values(graph, place, products, [product, split], outputs, split.outputs)


def _joined(graph: ir.Graph, weights: list[ir.Value], shape: tuple[int, int]) -> ir.Value:
    tensors = [weight.const_value for weight in weights if weight.const_value is not None]
    name, dtype = f"{weights[0].name}.joined", tensors[0].dtype

    def join() -> ir.TensorProtocol:
        values = np.concatenate([tensor.numpy() for tensor in tensors], axis=1)
        for tensor in tensors:
            release(tensor)
        return ir.tensor(values, dtype=dtype, name=name)

    lazy = ir.LazyTensor(join, dtype=dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(value)
    return value
