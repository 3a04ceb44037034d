"""Values of a graph in both orders of dimensions, while images are turned channels-last."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sdc.passes.lowering.lower_multi_head_attention import ORT_DOMAIN
from sdc.passes.matching import constant

CHANNELS_LAST = [0, 2, 3, 1]
"""[B, C, H, W] → [B, H, W, C]."""

CHANNELS_FIRST = [0, 3, 1, 2]
"""[B, H, W, C] → [B, C, H, W]."""


@dataclass
class NhwcLayout:
    """The state of one run: which values exist channels-last.

    Attributes:
        twins: a value in [B, C, H, W] → the same in [B, H, W, C].
        parameters: gamma and beta in float32.
    """

    graph: ir.Graph
    twins: dict[ir.Value, ir.Value] = field(default_factory=dict)
    parameters: dict[ir.Value, ir.Value] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def last(self, value: ir.Value | None, *, before: ir.Node) -> ir.Value:
        """`value` channels-last."""
        assert value is not None
        if value not in self.twins:
            turned = ir.node("Transpose", [value], {"perm": CHANNELS_LAST})
            self.graph.insert_before(before, turned)
            self.twins[value] = _describe(turned.outputs[0], value, "nhwc")
        return self.twins[value]

    def replace(self, old: ir.Node, new: list[ir.Node], outputs: list[ir.Value]) -> None:
        """Put `new` where `old` stands; `outputs` are those of `old`, channels-last."""
        self.graph.insert_before(old, new)
        for before, after in zip(old.outputs, outputs, strict=True):
            back = ir.node("Transpose", [after], {"perm": CHANNELS_FIRST})
            self.graph.insert_before(old, back)
            nchw = back.outputs[0]
            nchw.type, nchw.shape = before.type, before.shape
            _describe(after, before, "nhwc")
            ir.convenience.replace_all_uses_with(before, nchw, replace_graph_outputs=True)
            nchw.name, before.name = before.name, None
            self.twins[nchw] = after
        self.graph.remove(old, safe=True)
        new[-1].name = old.name
        self.counts.update([new[-1].op_type])

    def weight(self, value: ir.Value) -> ir.Value:
        """The weight of a convolution, [M, kH, kW, C], turned when it is written."""
        if value not in self.twins:
            tensor = value.const_value
            assert tensor is not None
            name = f"{value.name}.nhwc"

            def turn() -> ir.TensorProtocol:
                turned = np.ascontiguousarray(tensor.numpy().transpose(CHANNELS_LAST))
                return ir.tensor(turned, dtype=tensor.dtype, name=name)

            sizes = tensor.shape.numpy()
            shape = ir.Shape([sizes[axis] for axis in CHANNELS_LAST])
            lazy = ir.LazyTensor(turn, dtype=tensor.dtype, shape=shape, name=name)
            self.twins[value] = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy)
            self.graph.register_initializer(self.twins[value])
        return self.twins[value]

    def affine(self, node: ir.Node) -> list[ir.Value]:
        """gamma and beta, the last two operands."""
        return [self._parameter(value) for value in node.inputs[-2:] if value is not None]

    def _parameter(self, value: ir.Value) -> ir.Value:
        """An initialiser in float32, which is what the norms' kernels take."""
        if value.dtype == ir.DataType.FLOAT:
            return value
        if value not in self.parameters:
            values = constant(value)
            assert values is not None  # the pass has asked
            self.parameters[value] = self.constant(f"{value.name}.float32", values.astype(np.float32))
        return self.parameters[value]

    def norm(self, node: ir.Node, x: ir.Value, *, skip: ir.Value | None = None) -> ir.Node:
        """The norm of a fused node, on a channels-last image."""
        attributes = {
            "groups": node.attributes["num_groups"].as_int(),
            "epsilon": node.attributes.get_float("epsilon", 1e-5),
            "activation": int("Silu" in node.op_type),
            "channels_last": 1,
        }
        operands = [x, *self.affine(node), *([skip] if skip is not None else [])]
        op_type, outputs = ("GroupNorm", 1) if skip is None else ("SkipGroupNorm", 2)
        norm = ir.node(op_type, operands, attributes, domain=ORT_DOMAIN, num_outputs=outputs)
        for output in norm.outputs:
            output.type = x.type
        return norm

    def constant(self, name: str, values: np.ndarray) -> ir.Value:
        """A small new initialiser."""
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _describe(last: ir.Value, first: ir.Value, suffix: str) -> ir.Value:
    """Name, type and shape of a channels-last value."""
    last.name = f"{first.name}.{suffix}"
    last.type = first.type if first.type is not None else last.type
    if first.shape is not None and len(first.shape) == 4:
        last.shape = ir.Shape([first.shape[axis] for axis in CHANNELS_LAST])
    return last
