"""Remove operators that give back their operand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport
from sdc.passes.matching import FLOATS, constant_tensor, dimensions, is_operator, producer

_NEUTRAL = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}
_SIDES = {"Add": (0, 1), "Mul": (0, 1), "Sub": (0,), "Div": (0,)}
"""Operands that may be the result."""

_LARGEST = 64
"""Largest initialiser to look into, in elements: the number of groups of a norm."""


@dataclass(frozen=True)
class DropNeutral(Pass):
    """No arithmetic with a neutral element is left, and no Reshape, Expand or Slice to the shape that is there.

    The TorchScript exporter writes ``x / rescale_output_factor`` and ``x + 0 * y`` (torch's baddbmm with beta = 0) as
    they stand.

    Before → after::

        Add(x, 0), Sub(x, 0), Mul(x, 1), Div(x, 1)    →  x
        Reshape(x, s), Expand(x, s), Slice(x, ...)    →  x

    Preconditions:

    1. The neutral operand is an initialiser, or a ConstantOfShape, or an Expand or a multiple of such.
    2. The result has the shape of ``x``, known in every dimension, and its element type.
    3. The steps of a Slice are 1.
    4. The result is no output of the graph.

    Not matched: ``0 * x`` for a fed x, which is not 0 where x is infinite.
    """

    name: ClassVar[str] = "drop-neutral"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Remove all; the match count is the number of nodes that went."""
        matched = 0
        for node in list(model.graph):
            kept = _kept_operand(node)
            if kept is not None and not node.outputs[0].is_graph_output():
                ir.convenience.replace_all_uses_with(node.outputs[0], kept)
                model.graph.remove(node, safe=True)
                matched += 1
        return PassReport(name=self.name, matched=matched)


def _kept_operand(node: ir.Node) -> ir.Value | None:
    if node.domain != "":
        return None
    if node.op_type in ("Reshape", "Expand") or (node.op_type == "Slice" and _steps_are_one(node)):
        value = node.inputs[0]
        return value if _same(value, node.outputs[0]) else None
    for side in _SIDES.get(node.op_type, ()):
        value, other = node.inputs[side], node.inputs[1 - side]
        is_neutral = uniform_value(other) == _NEUTRAL[node.op_type]
        if is_neutral and value is not None and value.dtype in FLOATS and _same(value, node.outputs[0]):
            return value
    return None


def _steps_are_one(node: ir.Node) -> bool:
    return len(node.inputs) < 5 or uniform_value(node.inputs[4]) == 1.0


def _same(a: ir.Value | None, b: ir.Value) -> bool:
    shape = dimensions(a)
    return a is not None and shape is not None and None not in shape and shape == dimensions(b) and a.dtype == b.dtype


def uniform_value(value: ir.Value | None) -> float | None:
    """The number that every element of a constant is, or None."""
    tensor = constant_tensor(value)
    if tensor is not None:
        array = tensor.numpy() if 0 < tensor.size <= _LARGEST else None
        return float(array.flat[0]) if array is not None and np.all(array == array.flat[0]) else None
    node = None if value is None else value.producer()
    if is_operator(node, "Expand"):
        return uniform_value(node.inputs[0])  # type: ignore[union-attr]
    if is_operator(node, "ConstantOfShape"):
        assert node is not None
        return float(node.attributes["value"].as_tensor().numpy().flat[0]) if "value" in node.attributes else 0.0
    if (product := producer(value, "Mul")) is not None:
        factors = [uniform_value(factor) for factor in product.inputs]
        return None if None in factors else float(np.prod(factors))  # type: ignore[arg-type]
    return None
