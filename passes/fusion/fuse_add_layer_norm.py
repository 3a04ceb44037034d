"""Fuse the residual sum of a transformer with the LayerNorm behind it, and with the bias before it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.fusion.linear_bias import BiasedProduct, match_biased_product
from sdc.passes.fusion.sum_before_norm import equal_sizes
from sdc.passes.matching import constant, dimensions, is_operator, producer, replace_nodes, site


@dataclass(frozen=True)
class FuseAddLayerNorm(Pass):
    """Bias, residual sum and LayerNorm become one node that also gives the sum, which the next residual reads.

    Before → after::

        s = Add(x, r); y = LayerNormalization(s, gamma, beta)
            →  (y, s) = sdc.AddLayerNorm(x, r, gamma, beta)
        s = Add(Add(MatMul(a, w), bias), r); y = LayerNormalization(s, gamma, beta)
            →  (y, s) = sdc.BiasAddLayerNorm(MatMul(a, w), bias, r, gamma, beta)

    The projection's MatMul stays in the main graph. Whichever way round the Adds were written, the branch comes first
    and the residual is what is added to it.

    Preconditions:

    1. The norm is over the last axis, has gamma and beta, both initialisers, and only its first output is used.
    2. Its statistics are computed in float32 (``stash_type`` is 1).
    3. Both terms of the sum are known to have its shape.
    4. With bias: it is an initialiser [C] added to a MatMul's output, and nothing else reads that sum.

    Not matched: norms of something else than a sum of two computed tensors. Where 4 fails, the bias stays outside.
    """

    name: ClassVar[str] = "fuse-add-layer-norm"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Fuse all sites; the details count those with and without bias."""
        forms: Counter[str] = Counter()
        skipped: list[Skipped] = []
        for norm in [node for node in model.graph if is_operator(node, "LayerNormalization")]:
            add = producer(norm.inputs[0], "Add")
            if add is None or any(constant(term) is not None for term in add.inputs):
                continue  # a bias alone or a table of positions is no residual
            if reason := _reason_against(add, norm):
                skipped.append(Skipped(site(norm), reason))
                continue
            operator = _fuse(add, norm)
            domain.import_operator(model, operator)
            forms["bias_residual" if operator == domain.BIAS_ADD_LAYER_NORM else "residual"] += 1
        details = {"forms": dict(sorted(forms.items()))}
        return PassReport(name=self.name, matched=forms.total(), skipped=tuple(skipped), details=details)


def _reason_against(add: ir.Node, norm: ir.Node) -> str | None:
    total = dimensions(add.outputs[0])
    if total is None:
        return "the shape of the sum is unknown"
    if norm.attributes.get_int("axis", -1) not in (-1, len(total) - 1):
        return f"normalised from axis {norm.attributes.get_int('axis')} on, expected the last"
    if len([value for value in norm.inputs if constant(value) is not None]) != 2:
        return "gamma or beta is missing or computed, expected initialisers"
    if any(output.uses() or output.is_graph_output() for output in norm.outputs[1:]):
        return "outputs besides the first are used"
    if (stash_type := norm.attributes.get_int("stash_type", 1)) != ir.DataType.FLOAT:
        return f"statistics in {ir.DataType(stash_type).name}, expected FLOAT"
    terms = [dimensions(value) for value in add.inputs]
    if not all(equal_sizes(term, total) for term in terms):
        return f"terms {terms[0]} and {terms[1]} are not known to be equal"
    return None


def _fuse(add: ir.Node, norm: ir.Node) -> str:
    """Replace the site; the operator that it became."""
    first, second = add.inputs
    biased = match_biased_product(first)
    if biased is None and (biased := match_biased_product(second)) is not None:
        first, second = second, first
    operator, operands, old = _operator(biased, first, second)
    fused = ir.node(
        operator,
        [*operands, *norm.inputs[1:]],
        # Source: ONNX LayerNormalization-17, default of epsilon.
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        domain=domain.DOMAIN,
        num_outputs=2,
    )
    replace_nodes([*old, add, norm], fused, [norm.outputs[0], add.outputs[0]], at=add)
    return operator


def _operator(
    biased: BiasedProduct | None, branch: ir.Value | None, residual: ir.Value | None
) -> tuple[str, list[ir.Value | None], list[ir.Node]]:
    """Operator, its first operands, and the nodes that go besides the sum and the norm."""
    if biased is None:
        return domain.ADD_LAYER_NORM, [branch, residual], []
    return domain.BIAS_ADD_LAYER_NORM, [biased.product, biased.bias, residual], [biased.add]
