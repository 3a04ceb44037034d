"""Map fused operators on tokens to ONNX Runtime's CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.lowering.lower_multi_head_attention import ORT_DOMAIN
from sdc.passes.matching import dimensions, site


@dataclass(frozen=True)
class LowerToContrib(Pass):
    """Fused operators become the operators of domain com.microsoft that compute the same in one CUDA kernel.

    Before → after::

        y = sdc.BiasGeGlu(x, bias)                        →  y = BiasSplitGelu(x, bias)
        y = sdc.BiasAdd(x, bias, r)                       →  y = BiasAdd(x, bias, r)
        (y, s) = sdc.AddLayerNorm(x, r, g, b)             →  (y, , , s) = SkipLayerNormalization(x, r, g, b)
        (y, s) = sdc.BiasAddLayerNorm(x, bias, r, g, b)   →  (y, , , s) = SkipLayerNormalization(x, r, g, b, bias)
        y = sdc.Silu(x)                                   →  y = QuickGelu(x), alpha = 1
        y = sdc.QuickGelu(x)                              →  y = QuickGelu(x), alpha = 1.702

    Preconditions:

    1. BiasSplitGelu: x has one of `geglu_widths` channels, and the Gelu is the exact one.
    2. BiasAdd: x has one of `bias_add_widths` channels.
    3. SkipLayerNormalization: x has rank 3.

    Not matched: what fails these; it is inlined. `OmitOutputs` has to follow: mean and deviation are no outputs of the
    kernel.

    Source: ONNX Runtime, docs/ContribOperators.md and contrib_ops/cuda/diffusion: kernels exist for these widths alone.

    Attributes:
        geglu_widths: channels that BiasSplitGelu has kernels for.
        bias_add_widths: channels that BiasAdd has kernels for.
    """

    geglu_widths: frozenset[int] = frozenset({2560, 5120, 10240})
    bias_add_widths: frozenset[int] = frozenset({320, 640, 1280})
    name: ClassVar[str] = "lower-to-contrib"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites; the details count them by operator."""
        counts: dict[str, int] = {}
        skipped: list[Skipped] = []
        for node in [node for node in model.graph if node.domain == domain.DOMAIN]:
            if reason := self._reason_against(node):
                skipped.append(Skipped(site(node), reason))
            elif (lowered := _lowered(node)) is not None:
                new_outputs = [lowered.outputs[0], *lowered.outputs[3:]]
                ir.convenience.replace_nodes_and_values(model.graph, node, [node], [lowered], node.outputs, new_outputs)
                counts[lowered.op_type] = counts.get(lowered.op_type, 0) + 1
        if counts:
            model.graph.opset_imports[ORT_DOMAIN] = 1
        return PassReport(self.name, sum(counts.values()), tuple(skipped), details=dict(sorted(counts.items())))

    def _reason_against(self, node: ir.Node) -> str | None:
        sizes = dimensions(node.inputs[0])
        width = None if not sizes else sizes[-1]
        if node.op_type == domain.BIAS_GEGLU:
            if node.attributes.get_string("approximate") != "none":
                return "the Gelu is approximated, expected the exact one"
            return None if width in self.geglu_widths else f"no kernel for {width} channels"
        if node.op_type == domain.BIAS_ADD:
            return None if width in self.bias_add_widths else f"no kernel for {width} channels"
        if node.op_type in (domain.ADD_LAYER_NORM, domain.BIAS_ADD_LAYER_NORM):
            return None if sizes is not None and len(sizes) == 3 else f"x is {sizes}, expected rank 3"
        return None


def _lowered(node: ir.Node) -> ir.Node | None:
    """The contributed operator for a fused one; None if it has none here."""
    if node.op_type == domain.BIAS_GEGLU:
        return _node("BiasSplitGelu", node.inputs, node)
    if node.op_type == domain.BIAS_ADD:
        return _node("BiasAdd", node.inputs, node)
    if node.op_type == domain.SILU:
        return _node("QuickGelu", node.inputs, node, alpha=1.0)
    if node.op_type == domain.QUICK_GELU:
        return _node("QuickGelu", node.inputs, node, alpha=1.702)
    if node.op_type not in (domain.ADD_LAYER_NORM, domain.BIAS_ADD_LAYER_NORM):
        return None
    bias = [node.inputs[1]] if node.op_type == domain.BIAS_ADD_LAYER_NORM else []
    operands = [node.inputs[0], *node.inputs[-3:], *bias]
    return _node("SkipLayerNormalization", operands, node, outputs=4, epsilon=node.attributes["epsilon"].as_float())


def _node(
    op_type: str, inputs: Sequence[ir.Value | None], old: ir.Node, *, outputs: int = 1, **attributes: float
) -> ir.Node:
    return ir.node(op_type, inputs, attributes, domain=ORT_DOMAIN, num_outputs=outputs, name=old.name)
