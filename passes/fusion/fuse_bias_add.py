"""Fuse a linear layer's bias with the residual sum behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.fusion.linear_bias import match_biased_product
from sdc.passes.fusion.sum_before_norm import equal_sizes
from sdc.passes.matching import dimensions, is_operator, replace_nodes, site


@dataclass(frozen=True)
class FuseBiasAdd(Pass):
    """The bias of a transformer's last projection and the residual sum become one node.

    Before → after::

        y = Add(Add(MatMul(a, w), bias), r)  →  y = sdc.BiasAdd(MatMul(a, w), bias, r)

    Preconditions:

    1. The bias is an initialiser [C] added to a MatMul's output, and nothing but the second Add reads that sum.
    2. The residual is known to have the sum's shape.

    Not matched: sums that a LayerNorm follows, which `FuseAddLayerNorm` has taken before.
    """

    name: ClassVar[str] = "fuse-bias-add"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Fuse all sites."""
        matched = 0
        skipped: list[Skipped] = []
        for add in [node for node in model.graph if is_operator(node, "Add")]:
            for value, residual in (add.inputs, tuple(reversed(add.inputs))):
                biased = match_biased_product(value)
                if biased is None:
                    continue
                if not equal_sizes(dimensions(residual), dimensions(add.outputs[0])):
                    sizes = dimensions(residual), dimensions(add.outputs[0])
                    skipped.append(Skipped(site(add), f"{sizes[0]} is added, expected the sum's {sizes[1]}"))
                    break
                operands = [biased.product, biased.bias, residual]
                fused = ir.node(domain.BIAS_ADD, operands, domain=domain.DOMAIN)
                replace_nodes([biased.add, add], fused, add.outputs, at=add)
                matched += 1
                break
        if matched:
            domain.import_operator(model, domain.BIAS_ADD)
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))
