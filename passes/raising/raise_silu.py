"""Recognise SiLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import is_operator, producer, replace_nodes, site, sole_consumer


@dataclass(frozen=True)
class RaiseSilu(Pass):
    """Every SiLU is one node `sdc.Silu`, whichever way it was written.

    Before → after::

        Mul(x, Sigmoid(x)), factors in either order     →  sdc.Silu(x)

    Preconditions:

    1. The argument of Sigmoid is the very value that the other factor is.
    2. Nothing but the product reads the Sigmoid.

    Not matched: QuickGELU (``x * Sigmoid(1.702 * x)``) and gates (``x * Sigmoid(y)``), which fail precondition 1;
    HardSwish, which is another function.
    """

    name: ClassVar[str] = "raise-silu"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites; Sigmoids that gate something else are reported as skipped."""
        matched = 0
        skipped: list[Skipped] = []
        for node in list(model.graph):
            if not is_operator(node, "Mul"):
                continue
            found = _match(node)
            if isinstance(found, str):
                skipped.append(Skipped(site(node), found))
            elif found is not None:
                argument, old = found
                replace_nodes(old, ir.node(domain.SILU, [argument], domain=domain.DOMAIN), node.outputs, at=node)
                matched += 1
        if matched:
            domain.import_operator(model, domain.SILU)
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))


def _match(node: ir.Node) -> tuple[ir.Value, list[ir.Node]] | str | None:
    """SiLU's argument and the nodes that spell it, or why `node` is none, or None if it does not look like one."""
    gates = [producer(factor, "Sigmoid") for factor in node.inputs]
    if gates == [None, None]:
        return None
    for gate, argument in zip(gates, reversed(node.inputs), strict=True):
        if gate is not None and argument is not None and gate.inputs[0] is argument:
            if sole_consumer(gate.outputs[0]) is not node:
                return "something else reads the Sigmoid"
            return argument, [gate, node]
    return "the Sigmoid's argument is not the other factor"
