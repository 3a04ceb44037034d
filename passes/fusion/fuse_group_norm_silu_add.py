"""Fuse GroupNorm+SiLU with the residual sum behind it: the chain Conv → GroupNorm → SiLU → Add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.fusion.sum_before_norm import equal_sizes
from sdc.passes.matching import dimensions, is_operator, replace_nodes, site, sole_consumer


@dataclass(frozen=True)
class FuseGroupNormSiluAdd(Pass):
    """GroupNorm+SiLU → Add becomes one node.

    Before → after::

        z = Add(r, sdc.GroupNormSilu(x, gamma, beta))  →  z = sdc.GroupNormSiluAdd(x, r, gamma, beta)

    The post-activation block, in which the residual is added to the activation. SD's networks hold none: their blocks
    normalise first and end in Conv → Add, and that sum is fused with the norm of the next block.

    Preconditions:

    1. Nothing but the Add reads the activation, and it is one of its terms only.
    2. The other term is known to have the sum's shape.

    Not matched: an activation that feeds a Conv; a sum that a further GroupNorm+SiLU reads, which
    `FuseAddGroupNormSilu` has taken before.
    """

    name: ClassVar[str] = "fuse-group-norm-silu-add"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Fuse all sites."""
        matched = 0
        skipped: list[Skipped] = []
        for norm in [node for node in model.graph if domain.is_fused(node, domain.GROUP_NORM_SILU)]:
            add = sole_consumer(norm.outputs[0])
            if not is_operator(add, "Add"):
                continue
            assert add is not None
            residuals = [value for value in add.inputs if value is not norm.outputs[0]]
            if len(residuals) != 1 or not equal_sizes(dimensions(residuals[0]), dimensions(add.outputs[0])):
                sizes = [dimensions(value) for value in residuals]
                skipped.append(Skipped(site(norm), f"terms {sizes} are added, expected one of the sum's shape"))
                continue
            fused = ir.node(
                domain.GROUP_NORM_SILU_ADD,
                [norm.inputs[0], residuals[0], *norm.inputs[1:]],
                norm.attributes,
                domain=domain.DOMAIN,
            )
            replace_nodes([norm, add], fused, add.outputs, at=add)
            matched += 1
        if matched:
            domain.import_operator(model, domain.GROUP_NORM_SILU_ADD)
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))
