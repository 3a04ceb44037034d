"""Fuse the gate of a transformer's feed-forward layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.fusion.linear_bias import BiasedProduct, match_biased_product
from sdc.passes.matching import constant, dimensions, is_operator, producer, replace_nodes, site, sole_consumer


@dataclass(frozen=True)
class FuseBiasGeGlu(Pass):
    """Bias, Split, Gelu and product become one node.

    Before → after::

        v, g = Split(Add(MatMul(x, w), bias), 2, axis=-1); y = Mul(v, Gelu(g))
            →  y = sdc.BiasGeGlu(MatMul(x, w), bias)

    The MatMul stays in the main graph.

    Preconditions:

    1. The Gelu's argument is the second of two equal parts along the last axis, the other factor is the first part.
    2. What is split is a MatMul's output plus an initialiser [2C], and nothing but the Split reads that sum.
    3. Nothing but the site reads either part or the Gelu.

    Not matched: gates of another function (SwiGLU, GLU); a Gelu without Split.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202, equation 6.
    """

    name: ClassVar[str] = "fuse-bias-geglu"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Fuse all sites; a Gelu of a Split's output that is not one is reported as skipped."""
        matched = 0
        skipped: list[Skipped] = []
        for gelu in [node for node in model.graph if is_operator(node, "Gelu")]:
            split = producer(gelu.inputs[0], "Split")
            if split is None:
                continue
            found = _match(split, gelu)
            if isinstance(found, str):
                skipped.append(Skipped(site(gelu), found))
                continue
            biased, product = found
            fused = ir.node(
                domain.BIAS_GEGLU,
                [biased.product, biased.bias],
                # Source: ONNX Gelu-20, default of approximate.
                {"approximate": gelu.attributes.get_string("approximate", "none")},
                domain=domain.DOMAIN,
            )
            replace_nodes([biased.add, split, gelu, product], fused, product.outputs, at=product)
            matched += 1
        if matched:
            domain.import_operator(model, domain.BIAS_GEGLU)
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))


def _match(split: ir.Node, gelu: ir.Node) -> tuple[BiasedProduct, ir.Node] | str:
    """What is split and the node that joins the parts again, or why the site is left alone."""
    if reason := _not_in_halves(split):
        return reason
    value, gate = split.outputs
    if gelu.inputs[0] is not gate:
        return "the Gelu is of the first part, expected the second"
    product = sole_consumer(value)
    if product is None or sole_consumer(gate) is not gelu or sole_consumer(gelu.outputs[0]) is not product:
        return "something besides the product reads a part or the Gelu"
    if not is_operator(product, "Mul"):
        return f"the parts meet in {product.op_type}, expected Mul"
    biased = match_biased_product(split.inputs[0])
    return (biased, product) if biased is not None else "what is split is no MatMul with a bias that only it reads"


def _not_in_halves(split: ir.Node) -> str | None:
    shape = dimensions(split.inputs[0])
    if shape is None or not isinstance(shape[-1], int):
        return "the width of what is split is unknown"
    if split.attributes.get_int("axis", 0) not in (-1, len(shape) - 1):
        return f"split along axis {split.attributes.get_int('axis', 0)}, expected the last"
    sizes = constant(split.inputs[1]) if len(split.inputs) > 1 and split.inputs[1] is not None else None
    widths = [dimensions(output) or (None,) for output in split.outputs] if sizes is None else sizes.tolist()
    halves = [width[-1] if isinstance(width, tuple) else width for width in widths]
    return None if halves == [shape[-1] // 2] * 2 else f"{shape[-1]} is split into {halves}, expected two equal parts"
