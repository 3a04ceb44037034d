"""Write commutative operators in one order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.base import Pass, PassReport
from sdc.passes.matching import constant_tensor, is_operator


@dataclass(frozen=True)
class OrderOperands(Pass):
    """An initialiser is the second operand of Add and Mul.

    The TorchScript exporter writes a bias in front of the product that it is added to, the dynamo exporter behind it.

    Before → after, with c an initialiser and x none::

        Add(c, x), Mul(c, x)  →  Add(x, c), Mul(x, c)

    Not matched: two initialisers, or none.
    """

    name: ClassVar[str] = "order-operands"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Exchange operands; the match count is the number of nodes that changed."""
        matched = 0
        for node in model.graph:
            if not is_operator(node, "Add") and not is_operator(node, "Mul"):
                continue
            first, second = node.inputs
            if constant_tensor(first) is not None and constant_tensor(second) is None:
                node.replace_input_with(0, second)
                node.replace_input_with(1, first)
                matched += 1
        return PassReport(name=self.name, matched=matched)
