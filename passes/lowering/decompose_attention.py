"""Write attention as MatMul and Softmax where a backend has no fused kernel for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import dimensions, is_operator, site


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Attention that the backend's fused kernels do not take becomes MatMul, Softmax, MatMul.

    Before → after, with q, k, v: [B, heads, S, d]::

        y = Attention(q, k, v, mask)
            →  y = Softmax(Where(mask, q * scale · kᵀ, lowest)) · v     boolean mask
               y = Softmax(q * scale · kᵀ + mask) · v                   additive mask
               y = Softmax(q * scale · kᵀ) · v                          no mask

    Applies where the element type is not in `dtypes` or the head size is not in `head_sizes`.

    Preconditions:

    1. Operands of rank 4 with a static head size and a known type; one number of heads.
    2. Not causal by attribute, no soft cap, no cache, no second output.

    Not matched: what fails these; the backend decides.

    Attributes:
        dtypes: element types that the fused kernels take.
        head_sizes: head sizes that the fused kernels take.
    """

    dtypes: frozenset[ir.DataType]
    head_sizes: frozenset[int]
    name: ClassVar[str] = "decompose-attention"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace the attentions that have no fused kernel; the details count those that have one."""
        matched = kept = 0
        skipped: list[Skipped] = []
        for attention in [node for node in model.graph if is_operator(node, "Attention")]:
            query = attention.inputs[0]
            assert query is not None
            shape = dimensions(query)
            if shape is not None and query.dtype in self.dtypes and shape[-1] in self.head_sizes:
                kept += 1
            elif reason := _reason_against(attention):
                skipped.append(Skipped(site(attention), reason))
            else:
                _decompose(model.graph, attention)
                matched += 1
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped), details={"kept_fused": kept})


def _reason_against(attention: ir.Node) -> str | None:
    shapes = [dimensions(value) for value in attention.inputs[:3]]
    if any(shape is None or len(shape) != 4 for shape in shapes) or attention.inputs[0].dtype is None:  # type: ignore[union-attr]
        return "operands are not known to have rank 4 and an element type"
    if len({(shape[1]) for shape in shapes if shape is not None}) != 1:
        return "numbers of heads differ"
    if shapes[0] is None or not isinstance(shapes[0][3], int):
        return "the head size is not static"
    if attention.attributes.get_int("is_causal", 0) != 0 or attention.attributes.get_float("softcap", 0.0) != 0.0:
        return "causal or with a soft cap"
    if any(value is not None for value in attention.inputs[4:]) or any(v.uses() for v in attention.outputs[1:]):
        return "a key/value cache, padding lengths or a second output"
    return None


def _decompose(graph: ir.Graph, attention: ir.Node) -> None:
    query, key, value = attention.inputs[:3]
    mask = attention.inputs[3] if len(attention.inputs) > 3 else None
    assert query is not None
    assert query.dtype is not None
    shape = dimensions(query)
    assert shape is not None
    assert isinstance(shape[3], int)
    dtype = query.dtype
    scale = attention.attributes["scale"].as_float() if "scale" in attention.attributes else shape[3] ** -0.5
    new: list[ir.Node] = []

    def apply(op_type: str, inputs: list[ir.Value | None], **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.outputs[0].dtype = dtype
        new.append(node)
        return node.outputs[0]

    def scalar(suffix: str, number: float) -> ir.Value:
        tensor = ir.tensor(np.array(number, dtype.numpy()), dtype=dtype, name=f"{attention.outputs[0].name}.{suffix}")
        scalar_value = ir.Value(name=tensor.name, shape=ir.Shape([]), type=ir.TensorType(dtype), const_value=tensor)
        graph.register_initializer(scalar_value)
        return scalar_value

    transposed = apply("Transpose", [key], perm=[0, 1, 3, 2])
    scores = apply("MatMul", [apply("Mul", [query, scalar("scale", scale)]), transposed])
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        # The lowest finite number, not infinity: a row without any key stays a number.
        scores = apply("Where", [mask, scores, scalar("masked", float(np.finfo(dtype.numpy()).min))])
    elif mask is not None:
        scores = apply("Add", [scores, mask])
    result = apply("MatMul", [apply("Softmax", [scores], axis=-1), value])
    ir.convenience.replace_nodes_and_values(graph, attention, [attention], new, attention.outputs[:1], [result])
