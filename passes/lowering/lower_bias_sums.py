"""Add a bias and a residual in one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport


@dataclass(frozen=True)
class LowerBiasSums(Pass):
    """Bias and residual sums become one Sum of three terms.

    Before → after::

        y = sdc.BiasAdd(x, bias, r)  →  y = Sum(x, bias, r)
        (y, s) = sdc.BiasAddLayerNorm(x, bias, r, gamma, beta)
            →  s = Sum(x, bias, r); y = LayerNormalization(s, gamma, beta)

    For ONNX Runtime on the CPU, where it is one kernel instead of two in the same time. Its own
    SkipLayerNormalization does all of it in one, but in several times the time of Sum and LayerNormalization.

    Preconditions: none; the operators are defined so.
    """

    name: ClassVar[str] = "lower-bias-sums"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites."""
        matched = 0
        for node in list(model.graph):
            if domain.is_fused(node, domain.BIAS_ADD) or domain.is_fused(node, domain.BIAS_ADD_LAYER_NORM):
                _lower(model.graph, node)
                matched += 1
        return PassReport(name=self.name, matched=matched)


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    total = ir.node("Sum", node.inputs[:3], name=node.name)
    total.outputs[0].type, total.outputs[0].shape = node.outputs[-1].type, node.outputs[-1].shape
    if node.op_type == domain.BIAS_ADD:
        new, outputs = [total], [total.outputs[0]]
    else:
        attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].as_float()}
        norm = ir.node("LayerNormalization", [total.outputs[0], *node.inputs[3:]], attributes, name=f"{node.name}.norm")
        new, outputs = [total, norm], [norm.outputs[0], total.outputs[0]]
        total.outputs[0].name = node.outputs[1].name
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, outputs)
