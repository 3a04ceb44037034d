"""Fuse the sum in front of a GroupNorm that no SiLU follows: a transformer's first norm."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.fusion.sum_before_norm import Terms, match_sum
from sdc.passes.matching import is_operator, producer, replace_nodes, site


@dataclass(frozen=True)
class FuseAddGroupNorm(Pass):
    """Add → GroupNormalization becomes one node that also gives the sum, which the block's end adds again.

    Before → after::

        s = Add(x, a); y = GroupNormalization(s, gamma, beta)  →  (y, s) = sdc.AddGroupNorm(x, a, gamma, beta)

    ``x`` and ``a`` are ordered as in `FuseAddGroupNormSilu`: the branch first.

    Preconditions:

    1. The shapes of both terms are known, and one of them is the sum's.
    2. The other is the sum's shape as well, or 1 in every spatial dimension and the sum's channels.
    3. ``gamma`` and ``beta`` are initialisers: the fused node takes the Add's place.
    4. The statistics are computed in float32 (``stash_type`` is 1).

    Not matched: norms with SiLU, which `FuseGroupNormSilu` has taken before; norms of something else than a sum.
    """

    name: ClassVar[str] = "fuse-add-group-norm"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Fuse all sites; the details count their forms."""
        forms: Counter[str] = Counter()
        skipped: list[Skipped] = []
        for norm in [node for node in model.graph if is_operator(node, "GroupNormalization")]:
            add = producer(norm.inputs[0], "Add")
            if add is None:
                continue
            found = _match(add, norm)
            if isinstance(found, str):
                skipped.append(Skipped(site(norm), found))
                continue
            forms[found.form] += 1
            _fuse(add, norm, found)
        if forms:
            domain.import_operator(model, domain.ADD_GROUP_NORM)
        details = {"forms": dict(sorted(forms.items()))}
        return PassReport(name=self.name, matched=forms.total(), skipped=tuple(skipped), details=details)


def _match(add: ir.Node, norm: ir.Node) -> Terms | str:
    if (stash_type := norm.attributes.get_int("stash_type", 1)) != ir.DataType.FLOAT:
        return f"statistics in {ir.DataType(stash_type).name}, expected FLOAT"
    return match_sum(add, norm)


def _fuse(add: ir.Node, norm: ir.Node, terms: Terms) -> None:
    fused = ir.node(
        domain.ADD_GROUP_NORM,
        [terms.x, terms.addend, *norm.inputs[1:]],
        {
            "num_groups": norm.attributes["num_groups"].as_int(),
            # Source: ONNX GroupNormalization-21, default of epsilon.
            "epsilon": norm.attributes.get_float("epsilon", 1e-5),
        },
        domain=domain.DOMAIN,
        num_outputs=2,
    )
    replace_nodes([add, norm], fused, [norm.outputs[0], add.outputs[0]], at=add)
