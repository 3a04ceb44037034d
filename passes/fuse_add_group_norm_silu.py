"""Fuse the sum in front of GroupNorm+SiLU: the time embedding's and the skip connection's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import constant, consumers, dimensions, producer, replace_nodes, same_size, site

TIME_EMBEDDING_ADD = "conv_time_embedding_add"
SKIP_ADD = "skip_add"


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
            found = _match(add, norm)
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


@dataclass(frozen=True)
class _Terms:
    x: ir.Value
    addend: ir.Value
    form: str


def _plain_form(x: ir.Value | None) -> str:
    forms = {"Conv": "conv", "Concat": "concat"}
    node = None if x is None else x.producer()
    return "other" if node is None else forms.get(node.op_type, "other")


def _match(add: ir.Node, norm: ir.Node) -> _Terms | str:
    """The sum's terms in the fused operator's order, or why the site is left alone."""
    if any(constant(parameter) is None for parameter in norm.inputs[1:]):
        return "gamma or beta is computed, expected initialisers"
    first, second = add.inputs
    assert first is not None
    assert second is not None
    total = dimensions(add.outputs[0])
    if total is None or dimensions(first) is None or dimensions(second) is None:
        return "the shape of the sum or of a term is unknown"
    # The branch comes first: a Conv's output where only one term is one.
    if producer(first, "Conv") is None and producer(second, "Conv") is not None:
        first, second = second, first
    for x, addend in ((first, second), (second, first)):
        if _equal(dimensions(x), total):
            if _equal(dimensions(addend), total):
                return _Terms(x, addend, SKIP_ADD)
            if _is_per_channel(dimensions(addend), total):
                return _Terms(x, addend, TIME_EMBEDDING_ADD if producer(x, "Conv") else "other")
    return f"terms {dimensions(first)} and {dimensions(second)} are neither equal nor one value per channel"


def _equal(a: tuple[int | str | None, ...] | None, b: tuple[int | str | None, ...]) -> bool:
    return a is not None and len(a) == len(b) and all(map(same_size, a, b))


def _is_per_channel(addend: tuple[int | str | None, ...] | None, total: tuple[int | str | None, ...]) -> bool:
    return (
        addend is not None
        and len(addend) == len(total)
        and (addend[0] == 1 or same_size(addend[0], total[0]))
        and same_size(addend[1], total[1])
        and all(size == 1 for size in addend[2:])
    )


def _fuse(add: ir.Node, norm: ir.Node, terms: _Terms) -> None:
    fused = ir.node(
        domain.ADD_GROUP_NORM_SILU,
        [terms.x, terms.addend, *norm.inputs[1:]],
        norm.attributes,
        domain=domain.DOMAIN,
        num_outputs=2,
    )
    replace_nodes([add, norm], fused, [norm.outputs[0], add.outputs[0]], at=add)
