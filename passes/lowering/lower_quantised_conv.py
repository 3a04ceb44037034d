"""lower-quantised-conv: convolutions of bytes as products of matrices, for ONNX Runtime on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.lowering.lower_multi_head_attention import ORT_DOMAIN
from sdc.passes.lowering.nhwc_layout import CHANNELS_FIRST, CHANNELS_LAST
from sdc.passes.matching import (
    add_initializer,
    constant,
    constant_tensor,
    dimensions,
    is_operator,
    producer,
    replace_nodes,
    site,
)

_LONGEST_ROW = np.iinfo(np.int32).max // (255 * 128)
_TO_THE_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class LowerQuantisedConv(Pass):
    """A convolution of dequantised operands becomes one product of integers with a float32 result.

    Before → after, for a kernel of kH x kW::

        y = Conv(DequantizeLinear(q, s, z), DequantizeLinear(w, t), b)
            →  p = Pad(Transpose(q, [0, 2, 3, 1]), pads, z)
               taps = Concat(the kH kW slices of p that the kernel's elements see, axis=3)
               m = MatMulIntegerToFloat(taps, w as [kH kW C, M], s, t, z, , b)
               y = Transpose(m, [0, 3, 1, 2])

    A kernel of one element needs no taps, one without a border no Pad. The integers are the same and their products
    are exact (on x86 without VNNI with weights of 7 bits); what is left is float32's rounding.

    Preconditions:

    1. q is uint8, with one scale and zero point, constant or computed; w is a constant int8 [M, C, kH, kW], with
       constant scales per output channel and no zero point but 0; kH kW C products fit in 32 bits.
    2. float32 results, one group, no dilation, explicit padding, a bias of rank 1 or none.

    Not matched: what fails these; ONNX Runtime dequantises both operands in each run and convolves in float32.

    Why: ONNX Runtime has integers in convolutions only where the result is quantised too (see lower-conv-to-bytes),
    and its ConvInteger was slower than float32 (1.31, AVX-512 with VNNI). This takes a third to a half of float32's
    time there.

    Source: ONNX Runtime, docs/ContribOperators.md, com.microsoft.MatMulIntegerToFloat.
    """

    name: ClassVar[str] = "lower-quantised-conv"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites."""
        skipped: list[Skipped] = []
        matched = 0
        for node in list(model.graph):
            if not is_operator(node, "Conv") or any(producer(x, "DequantizeLinear") is None for x in node.inputs[:2]):
                continue
            if reason := reason_against_quantised_conv(node):
                skipped.append(Skipped(site(node), reason))
                continue
            _lower(model.graph, node)
            matched += 1
        if matched:
            model.graph.opset_imports[ORT_DOMAIN] = 1
        return PassReport(self.name, matched, tuple(skipped))


def reason_against_quantised_conv(conv: ir.Node) -> str | None:
    """Why a convolution of two dequantised operands cannot be one of integers; None if it can."""
    activation, weight = (dequantize_behind(value) for value in conv.inputs[:2])
    return _reason_against_activation(activation) or _reason_against_weight(weight) or _reason_against_convolution(conv)


def _reason_against_activation(dequantize: ir.Node) -> str | None:
    integers, scale = dequantize.inputs[:2]
    if integers is None or integers.dtype != ir.DataType.UINT8:
        return "the activations are not uint8"
    for name, value in (("scale", scale), ("zero point", zero_point_of(dequantize))):
        if value is None or dimensions(value) not in ((), (1,)):
            return f"the {name} of the activations is not a single one"
    return None


def _reason_against_weight(dequantize: ir.Node) -> str | None:
    integers, scales = (constant_tensor(value) for value in dequantize.inputs[:2])
    if integers is None or integers.dtype != ir.DataType.INT8 or len(integers.shape) != 4:
        return "the weight is not constant int8 of rank 4"
    if scales is None or scales.dtype != ir.DataType.FLOAT:
        return "the scales of the weight are not constant float32"
    outputs, *row = integers.shape.numpy()
    if math.prod(row) > _LONGEST_ROW:
        return f"a sum of {math.prod(row)} products may not fit in 32 bits"
    if scales.shape.numpy() != (outputs,) or dequantize.attributes.get_int("axis", 1) != 0:
        return f"scales of shape {list(scales.shape.numpy())}, expected one for each of {outputs} output channels"
    zero_point = zero_point_of(dequantize)
    zeros = constant(zero_point)
    return None if zero_point is None or (zeros is not None and not zeros.any()) else "the weight has a zero point"


def _reason_against_convolution(conv: ir.Node) -> str | None:
    if conv.outputs[0].dtype != ir.DataType.FLOAT:
        return "the result is not float32"
    if (groups := conv.attributes.get_int("group", 1)) != 1:
        return f"{groups} groups"
    if any(step != 1 for step in conv.attributes.get_ints("dilations", ())):
        return "dilated"
    padding = conv.attributes.get_string("auto_pad", "NOTSET")
    return None if padding == "NOTSET" else f"auto_pad {padding}"


def dequantize_behind(value: ir.Value | None) -> ir.Node:
    """The DequantizeLinear that gives a value; it is known to be one."""
    node = producer(value, "DequantizeLinear")
    assert node is not None  # asked before
    return node


def zero_point_of(dequantize: ir.Node) -> ir.Value | None:
    """The third operand of a QuantizeLinear or DequantizeLinear, if there is one."""
    return dequantize.inputs[2] if len(dequantize.inputs) > 2 else None


@dataclass(frozen=True)
class _Builder:
    """Puts new nodes before a convolution, and names what they write after its result."""

    graph: ir.Graph
    conv: ir.Node
    name: str

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, list[int] | int],
        *,
        dtype: ir.DataType,
        domain: str = "",
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, domain=domain)
        node.outputs[0].type = ir.TensorType(dtype)
        self.graph.insert_before(self.conv, node)
        return node.outputs[0]

    def constant(self, key: str, numbers: Sequence[int]) -> ir.Value:
        return add_initializer(self.graph, np.array(numbers, np.int64), f"{self.name}.{key}")


def _lower(graph: ir.Graph, conv: ir.Node) -> None:
    activation, weight = (dequantize_behind(value) for value in conv.inputs[:2])
    name = conv.outputs[0].name
    assert name is not None  # named by FixNames and by every pass since
    integers, scales = weight.inputs[:2]
    assert integers is not None
    build = _Builder(graph, conv, name)
    image = build.node("Transpose", [activation.inputs[0]], {"perm": CHANNELS_LAST}, dtype=ir.DataType.UINT8)
    matrix, kernel = _as_matrix(graph, integers)
    taps = _taps(build, image, kernel, zero_point_of(activation))
    operands = [taps, matrix, activation.inputs[1], scales, zero_point_of(activation)]
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if bias is not None:
        operands += [None, bias]
    product = build.node("MatMulIntegerToFloat", operands, {}, dtype=ir.DataType.FLOAT, domain=ORT_DOMAIN)
    back = ir.node("Transpose", [product], {"perm": CHANNELS_FIRST})
    replace_nodes([conv, activation, weight], back, conv.outputs, at=conv)


def _taps(build: _Builder, image: ir.Value, kernel: tuple[int, ...], border: ir.Value | None) -> ir.Value:
    """[B, H', W', kH kW C] from [B, H, W, C]: what each element of the kernel sees, one after the other."""
    attributes = build.conv.attributes
    pads = attributes.get_ints("pads", [0] * 4)
    steps = attributes.get_ints("strides", [1] * 2)
    if any(pads):
        top, left, bottom, right = pads
        around = build.constant("pads", [0, top, left, 0, 0, bottom, right, 0])
        image = build.node("Pad", [image, around, border], {}, dtype=ir.DataType.UINT8)
    if kernel == (1, 1) and all(step == 1 for step in steps):
        return image
    axes, strides = build.constant("axes", [1, 2]), build.constant("strides", steps)
    slices = []
    for place in np.ndindex(*kernel):
        behind = [begin - (size - 1) for begin, size in zip(place, kernel, strict=True)]
        begin = build.constant(f"begin{place[0]}{place[1]}", place)
        end = build.constant(f"end{place[0]}{place[1]}", [each or _TO_THE_END for each in behind])
        slices.append(build.node("Slice", [image, begin, end, axes, strides], {}, dtype=ir.DataType.UINT8))
    return build.node("Concat", slices, {"axis": 3}, dtype=ir.DataType.UINT8) if len(slices) > 1 else slices[0]


def _as_matrix(graph: ir.Graph, weight: ir.Value) -> tuple[ir.Value, tuple[int, ...]]:
    """[M, C, kH, kW] as [kH kW C, M], made when it is written; and (kH, kW)."""
    tensor = weight.const_value
    assert tensor is not None  # asked before
    outputs, channels, *kernel = tensor.shape.numpy()
    name = f"{weight.name}.matrix"
    if name not in graph.initializers:
        shape = ir.Shape([math.prod(kernel) * channels, outputs])

        def turn() -> ir.TensorProtocol:
            matrix = tensor.numpy().transpose(2, 3, 1, 0).reshape(-1, outputs)
            return ir.tensor(np.ascontiguousarray(matrix), name=name)

        lazy = ir.LazyTensor(turn, dtype=tensor.dtype, shape=shape, name=name)
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy)
        graph.register_initializer(value)
    return graph.initializers[name], tuple(kernel)
