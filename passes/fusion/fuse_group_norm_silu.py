"""Fuse GroupNormalization with the SiLU behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.fusion.sites import check_fused, count_fused
from sdc.passes.matching import consumers, is_operator, replace_nodes, site, sole_consumer


@dataclass(frozen=True)
class FuseGroupNormSilu(Pass):
    """GroupNormalization → SiLU becomes one node.

    Before → after::

        sdc.Silu(GroupNormalization(x, gamma, beta))  →  sdc.GroupNormSilu(x, gamma, beta)

    Preconditions:

    1. Nothing but the SiLU reads the normalised tensor, and it is no output of the graph.
    2. The statistics are computed in float32 (``stash_type`` is 1), which is what the fused operator promises.

    Not matched: norms without SiLU (they are counted as ``without_silu``), and SiLU in a spelling that `RaiseSilu` does
    not know.

    Attributes:
        required: refuse a graph without a single site.
    """

    required: bool = False
    name: ClassVar[str] = "fuse-group-norm-silu"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Fuse all sites.

        Raises:
            PassError: none was fused although `required`.
        """
        matched = without_silu = 0
        skipped: list[Skipped] = []
        for norm in [node for node in model.graph if is_operator(node, "GroupNormalization")]:
            activations = [node for node in consumers(norm.outputs[0]) if domain.is_fused(node, domain.SILU)]
            if not activations:
                without_silu += 1
            elif reason := _reason_against(norm):
                skipped.append(Skipped(site(norm), reason))
            else:
                _fuse(norm, activations[0])
                matched += 1
        if matched:
            domain.import_operator(model, domain.GROUP_NORM_SILU)
        sites = count_fused(model, *domain.GROUP_NORM_SILU_OPERATORS)
        check_fused(self.name, sites, skipped, required=self.required)
        return PassReport(
            name=self.name, matched=matched, skipped=tuple(skipped), details={"without_silu": without_silu}
        )


def _reason_against(norm: ir.Node) -> str | None:
    if sole_consumer(norm.outputs[0]) is None:
        return "something besides the SiLU reads the normalised tensor"
    if (stash_type := norm.attributes.get_int("stash_type", 1)) != ir.DataType.FLOAT:
        return f"statistics in {ir.DataType(stash_type).name}, expected FLOAT"
    return None


def _fuse(norm: ir.Node, activation: ir.Node) -> None:
    fused = ir.node(
        domain.GROUP_NORM_SILU,
        norm.inputs,
        {
            "num_groups": norm.attributes["num_groups"].as_int(),
            # Source: ONNX GroupNormalization-21, default of epsilon.
            "epsilon": norm.attributes.get_float("epsilon", 1e-5),
        },
        domain=domain.DOMAIN,
    )
    replace_nodes([norm, activation], fused, activation.outputs, at=activation)
