"""Let the sum behind a convolution add its bias, for ONNX Runtime on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport
from sdc.passes.lowering.lower_multi_head_attention import ORT_DOMAIN
from sdc.passes.matching import add_initializer, constant, dimensions, is_operator, sole_consumer

_SKIP, _BIAS = 3, 4
"""Operands of SkipGroupNorm(x, gamma, beta, skip, bias)."""


@dataclass(frozen=True)
class MoveConvBias(Pass):
    """A convolution whose result is added to something keeps no bias of its own.

    ONNX Runtime runs NhwcConv as a convolution, and a second kernel that adds the bias: it reads and writes the whole
    image once more. SkipGroupNorm adds a bias on its way.

    Before → after, all operators of com.microsoft but Add::

        SkipGroupNorm(NhwcConv(x, w, b), gamma, beta, s)   →  SkipGroupNorm(NhwcConv(x, w), gamma, beta, s, b)
        the same with the convolution, or a second one, for s
        Add(NhwcConv(x, w, b), NhwcConv(y, v, c))          →  Add(NhwcConv(x, w), NhwcConv(y, v, b + c))

    Preconditions:

    1. The biases are initialisers of equal size.
    2. Nothing else reads the convolutions' results, and two are not the same one.

    Not matched: what fails these. A sum of a convolution and anything else keeps the bias: Add takes two operands.
    """

    name: ClassVar[str] = "move-conv-bias"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Move all biases that can be moved; the details count the operators that take them."""
        counts = {"SkipGroupNorm": 0, "Add": 0}
        for node in model.graph:
            if (node.domain, node.op_type, len(node.inputs)) == (ORT_DOMAIN, "SkipGroupNorm", _BIAS):
                if convs := _convs_with_bias(node, (0, _SKIP)):
                    node.resize_inputs(_BIAS + 1)
                    node.replace_input_with(_BIAS, _take_biases(model.graph, convs))
                    counts["SkipGroupNorm"] += len(convs)
            elif is_operator(node, "Add") and len(convs := _convs_with_bias(node, (0, 1))) > 1:
                total = _take_biases(model.graph, convs)
                convs[1].resize_inputs(3)
                convs[1].replace_input_with(2, total)
                counts["Add"] += 1
        return PassReport(self.name, sum(counts.values()), details=counts)


def _convs_with_bias(node: ir.Node, operands: tuple[int, ...]) -> list[ir.Node]:
    """Convolutions among these operands that nothing else reads, and that have a constant bias."""
    convs = []
    for index in operands:
        value = node.inputs[index]
        conv = None if value is None else value.producer()
        if conv is None or (conv.domain, conv.op_type) != (ORT_DOMAIN, "NhwcConv"):
            continue
        if len(conv.inputs) > 2 and constant(conv.inputs[2]) is not None and sole_consumer(conv.outputs[0]) is node:
            convs.append(conv)
    sizes = {dimensions(conv.inputs[2]) for conv in convs}
    return convs if len(set(convs)) == len(convs) and len(sizes) <= 1 else []


def _take_biases(graph: ir.Graph, convs: list[ir.Node]) -> ir.Value:
    """The sum of their biases, which they lose; made in float32 and rounded once."""
    biases = [conv.inputs[2] for conv in convs]
    for conv in convs:
        conv.resize_inputs(2)
    first = biases[0]
    assert first is not None
    assert first.dtype is not None
    if len(biases) == 1:
        return first
    total = sum(np.asarray(constant(bias), np.float32) for bias in biases)
    return add_initializer(graph, np.asarray(total).astype(first.dtype.numpy()), f"{first.name}.sum")
