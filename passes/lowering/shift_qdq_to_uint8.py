"""shift-qdq-to-uint8: activations as unsigned bytes, the same integers moved up by 128."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import add_initializer, is_operator, site

_OFFSET = 128


@dataclass(frozen=True)
class ShiftQdqToUint8(Pass):
    """Quantised activations become uint8, moved up by 128; what they stand for does not change.

    Before → after::

        DequantizeLinear(QuantizeLinear(x, s, int8 z), s, int8 z)
            →  DequantizeLinear(QuantizeLinear(x, s, uint8 z + 128), s, uint8 z + 128)

    1. The zero point of the QuantizeLinear is an int8 constant, of one number or one for each channel.
    2. All its readers are DequantizeLinear with the same zero point.

    Why: on x86 ONNX Runtime turns int8 activations into uint8 itself (its integer kernels multiply uint8 by int8), and
    from opset 21 on its rewriting contradicts itself where it has moved a pair across a Reshape: "output_dtype INT8
    does not match y_zero_point type UINT8" (seen in 1.31). Weights, which have no QuantizeLinear, stay int8.
    """

    name: ClassVar[str] = "shift-qdq-to-uint8"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Shift every pair; the zero points are shared."""
        offsets: dict[tuple[bytes, tuple[int, ...]], ir.Value] = {}
        skipped: list[Skipped] = []
        matched = 0
        for node in list(model.graph):
            if not is_operator(node, "QuantizeLinear"):
                continue
            reason = _reason_against(node)
            if reason is not None:
                skipped.append(Skipped(site(node), reason))
                continue
            zero_point = _zero_point(node)
            assert zero_point is not None  # `_reason_against` has asked
            offset = (zero_point.astype(np.int16) + _OFFSET).astype(np.uint8)
            key = (offset.tobytes(), offset.shape)
            if key not in offsets:
                name = f"sdc.qdq_offset.{offset.item() if offset.size == 1 else len(offsets)}"
                offsets[key] = add_initializer(model.graph, offset, name)
            readers = list(node.outputs[0].consumers())
            for each in (node, *readers):
                each.replace_input_with(2, offsets[key])
            node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
            matched += 1
        return PassReport(self.name, matched, tuple(skipped))


def _reason_against(node: ir.Node) -> str | None:
    zero_point = _zero_point(node)
    if zero_point is None or zero_point.dtype != np.int8:
        return "the zero point is not an int8 constant"
    if node.outputs[0].is_graph_output():
        return "the integers are an output of the graph"
    for reader in node.outputs[0].consumers():
        if not is_operator(reader, "DequantizeLinear"):
            return f"the integers are read by {site(reader)}, expected DequantizeLinear"
        theirs = _zero_point(reader)
        if theirs is None or theirs.dtype != np.int8 or not np.array_equal(theirs, zero_point):
            return f"{site(reader)} has another zero point"
    return None


def _zero_point(node: ir.Node) -> np.ndarray | None:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
