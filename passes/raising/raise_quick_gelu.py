"""Recognise QuickGELU, the activation of CLIP's first text encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import dimensions, is_close, is_operator, producer, replace_nodes, scalar, site, sole_consumer

FACTOR = 1.702
"""Source: Hendrycks and Gimpel, arXiv:1606.08415, section 2, the sigmoid approximation."""


@dataclass(frozen=True)
class RaiseQuickGelu(Pass):
    """Every QuickGELU is one node `sdc.QuickGelu`.

    Before → after::

        Mul(x, Sigmoid(Mul(x, 1.702)))  →  sdc.QuickGelu(x)

    Preconditions:

    1. What the Sigmoid takes is the other factor times a number, and the number is 1.702 in the element type of x.
    2. Nothing but the product reads the Sigmoid, and nothing but the Sigmoid its argument.

    Factors may stand in either order.

    Not matched: SiLU, whose argument is not scaled; other gates.
    """

    name: ClassVar[str] = "raise-quick-gelu"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites; sigmoids of other multiples of the other factor are reported as skipped."""
        matched = 0
        skipped: list[Skipped] = []
        for node in [each for each in model.graph if is_operator(each, "Mul")]:
            found = _match(node)
            if isinstance(found, str):
                skipped.append(Skipped(site(node), found))
            elif found is not None:
                argument, old = found
                raised = ir.node(domain.QUICK_GELU, [argument], domain=domain.DOMAIN)
                replace_nodes(old, raised, node.outputs, at=node)
                matched += 1
        if matched:
            domain.import_operator(model, domain.QUICK_GELU)
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))


def _match(node: ir.Node) -> tuple[ir.Value, list[ir.Node]] | str | None:
    """QuickGELU's argument and the nodes that spell it, or why `node` is none, or None if it does not look like one."""
    for gate_value, argument in zip(node.inputs, reversed(node.inputs), strict=True):
        gate = producer(gate_value, "Sigmoid")
        scaled = None if gate is None else producer(gate.inputs[0], "Mul")
        if gate is None or scaled is None or argument is None:
            continue
        a, b = scaled.inputs
        factor = scalar(b) if a is argument else scalar(a) if b is argument else None
        if factor is None:
            continue
        if not is_close(factor, FACTOR, argument.dtype):
            return f"the factor is {factor}, expected {FACTOR}"
        if sole_consumer(gate.outputs[0]) is not node or sole_consumer(scaled.outputs[0]) is not gate:
            return "something else reads the Sigmoid or its argument"
        if dimensions(node.outputs[0]) != dimensions(argument):
            return "the factor adds axes to the result"
        return argument, [scaled, gate, node]
    return None
