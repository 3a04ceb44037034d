"""Fuse the sum in front of GroupNorm+SiLU: the time embedding's and the skip connection's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.fusion.sum_before_norm import Terms, match_sum
from sdc.passes.matching import consumers, producer, replace_nodes, site


@dataclass(frozen=True)
class FuseAddGroupNormSilu(Pass):
    """Add → GroupNorm+SiLU becomes one node that also gives the sum, which the next skip connection reads.

    Before → after::

        s = Add(x, a); y = sdc.GroupNormSilu(s, gamma, beta)  →  (y, s) = sdc.AddGroupNormSilu(x, a, gamma, beta)

    ``x`` has the sum's shape; ``a`` is either [B, C, 1, 1] (the time embedding's projection behind a Conv) or has the
    sum's shape too (a skip connection). Whichever way round the Add was written, ``x`` comes first: it is the branch
    (a Conv's output where there is one) and ``a`` is what is added to it. A sum without other readers stays as an
    unused output.

    Preconditions:

    1. The shapes of both terms are known, and one of them is the sum's.
    2. The other is the sum's shape as well, or 1 in every spatial dimension and the sum's channels.
    3. ``gamma`` and ``beta`` are initialisers: the fused node takes the Add's place, where nothing computed later
       is available yet.

    Not matched: norms behind a Concat, a Resize or a Conv without a sum; they stay `GroupNormSilu`. A sum that several
    norms read is fused with the first of them; the others read its second output.

    The report's details count every GroupNorm+SiLU of the graph by the form of what feeds it, after fusion:
    ``conv_time_embedding_add``, ``skip_add``, ``conv``, ``concat`` and ``other``; ``sum_reused`` counts the fused sites
    whose sum has other readers.
    """

    name: ClassVar[str] = "fuse-add-group-norm-silu"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Fuse all sites."""
        matched = sum_reused = 0
        forms: Counter[str] = Counter()
        skipped: list[Skipped] = []
        for norm in [node for node in model.graph if domain.is_fused(node, domain.GROUP_NORM_SILU)]:
            add = producer(norm.inputs[0], "Add")
            if add is None:
                forms[_plain_form(norm.inputs[0])] += 1
                continue
            found = match_sum(add, norm)
            if isinstance(found, str):
                skipped.append(Skipped(site(norm), found))
                forms["other"] += 1
                continue
            forms[found.form] += 1
            sum_reused += len(consumers(add.outputs[0])) > 1 or add.outputs[0].is_graph_output()
            _fuse(add, norm, found)
            matched += 1
        if matched:
            domain.import_operator(model, domain.ADD_GROUP_NORM_SILU)
        details = {"forms": dict(sorted(forms.items())), "sum_reused": sum_reused}
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped), details=details)


def _plain_form(x: ir.Value | None) -> str:
    forms = {"Conv": "conv", "Concat": "concat"}
    node = None if x is None else x.producer()
    return "other" if node is None else forms.get(node.op_type, "other")


def _fuse(add: ir.Node, norm: ir.Node, terms: Terms) -> None:
    fused = ir.node(
        domain.ADD_GROUP_NORM_SILU,
        [terms.x, terms.addend, *norm.inputs[1:]],
        norm.attributes,
        domain=domain.DOMAIN,
        num_outputs=2,
    )
    replace_nodes([add, norm], fused, [norm.outputs[0], add.outputs[0]], at=add)
