"""Normalise images as images, not as rows of pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import dimensions, is_operator, producer, same_size, site


@dataclass(frozen=True)
class UnflattenGroupNorm(Pass):
    """A Reshape that merges the spatial axes moves behind the GroupNormalization, which then reads the image.

    Before → after, with x: [B, C, H, W]::

        GroupNormalization(Reshape(x, [B, C, H * W]))  →  Reshape(GroupNormalization(x), [B, C, H * W])

    The VAE's attention is written so. Statistics go over all spatial axes of a group, however these are arranged. With
    the norm out of the way, `FuseAddGroupNorm` sees the sum before it and `FuseTokens` the change of layout behind it.

    Preconditions:

    1. The Reshape keeps batch and channels; both are known to be equal, and there is at least one spatial axis.
    2. The element type and shape of x are known.

    Not matched: a Reshape that regroups channels (GroupNorm written with InstanceNormalization).
    """

    name: ClassVar[str] = "unflatten-group-norm"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Move all Reshapes."""
        matched = 0
        skipped: list[Skipped] = []
        for norm in [node for node in model.graph if is_operator(node, "GroupNormalization")]:
            reshape = producer(norm.inputs[0], "Reshape")
            if reshape is None:
                continue
            x = reshape.inputs[0]
            before, after = dimensions(x), dimensions(reshape.outputs[0])
            if before is None or after is None or min(len(before), len(after)) < 3:
                skipped.append(Skipped(site(norm), "the shapes around the Reshape are unknown"))
            elif not (same_size(before[0], after[0]) and same_size(before[1], after[1])):
                skipped.append(Skipped(site(norm), f"{before} becomes {after}, expected the same batch and channels"))
            else:
                assert x is not None
                _move(model.graph, reshape, norm, x)
                matched += 1
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))


def _move(graph: ir.Graph, reshape: ir.Node, norm: ir.Node, x: ir.Value) -> None:
    image = ir.node("GroupNormalization", [x, *norm.inputs[1:]], norm.attributes)
    flat = ir.node("Reshape", [image.outputs[0], reshape.inputs[1]], reshape.attributes)
    image.outputs[0].name = f"{norm.outputs[0].name}.image"
    image.outputs[0].shape, image.outputs[0].type = x.shape, x.type
    image.name, flat.name = norm.name, f"{norm.name}.flat"
    ir.convenience.replace_nodes_and_values(graph, norm, [norm], [image, flat], norm.outputs, flat.outputs)
