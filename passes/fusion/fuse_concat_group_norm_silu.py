"""Fuse the Concat in front of GroupNorm+SiLU: a UNet's way up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import constant, dimensions, producer, replace_nodes, site


@dataclass(frozen=True)
class FuseConcatGroupNormSilu(Pass):
    """Concat → GroupNorm+SiLU becomes one node that also gives what was joined, which the block's shortcut reads.

    Before → after::

        j = Concat(x, s, axis=1); y = sdc.GroupNormSilu(j, gamma, beta)
            →  (y, j) = sdc.ConcatGroupNormSilu(x, s, gamma, beta)

    Preconditions:

    1. Two tensors are joined, along the channels: axis 1, or -3 of four.
    2. ``gamma`` and ``beta`` are initialisers: the fused node takes the Concat's place.

    Not matched: more than two tensors; norms without SiLU.
    """

    name: ClassVar[str] = "fuse-concat-group-norm-silu"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Fuse all sites."""
        matched = 0
        skipped: list[Skipped] = []
        for norm in [node for node in model.graph if domain.is_fused(node, domain.GROUP_NORM_SILU)]:
            concat = producer(norm.inputs[0], "Concat")
            if concat is None:
                continue
            if reason := _reason_against(concat, norm):
                skipped.append(Skipped(site(norm), reason))
                continue
            _fuse(concat, norm)
            matched += 1
        if matched:
            domain.import_operator(model, domain.CONCAT_GROUP_NORM_SILU)
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))


def _reason_against(concat: ir.Node, norm: ir.Node) -> str | None:
    if len(concat.inputs) != 2:
        return f"{len(concat.inputs)} tensors are joined, expected two"
    axis = concat.attributes["axis"].as_int()
    shape = dimensions(concat.outputs[0])
    if axis < 0 and shape is not None:
        axis += len(shape)
    if axis != 1:
        return f"joined along axis {axis}, expected 1"
    if any(constant(parameter) is None for parameter in norm.inputs[1:]):
        return "gamma or beta is computed, expected initialisers"
    return None


def _fuse(concat: ir.Node, norm: ir.Node) -> None:
    fused = ir.node(
        domain.CONCAT_GROUP_NORM_SILU,
        [*concat.inputs, *norm.inputs[1:]],
        norm.attributes,
        domain=domain.DOMAIN,
        num_outputs=2,
    )
    replace_nodes([concat, norm], fused, [norm.outputs[0], concat.outputs[0]], at=concat)
