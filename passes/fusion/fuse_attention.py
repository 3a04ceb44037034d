"""Fuse attention with the splitting and merging of its heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.fusion.sites import check_fused, count_fused
from sdc.passes.matching import (
    dimensions,
    is_operator,
    permutation,
    producer,
    replace_nodes,
    same_size,
    site,
    sole_consumer,
)

_SPLIT = (0, 2, 1, 3)
"""[B, S, heads, head_size] ↔ [B, heads, S, head_size]."""


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Attention between head split and head merge becomes one node on [B, S, heads * head_size].

    Before → after, with d = head_size::

        split(x) = Transpose(Reshape(x, [B, S, heads, d]), perm=[0, 2, 1, 3])
        y = Reshape(Transpose(Attention(split(q), split(k), split(v), mask), perm=[0, 2, 1, 3]), [B, S, heads * d])
            →  y = sdc.MultiHeadAttention(q, k, v, mask)   with num_heads, scale, is_causal

    The projections around it stay MatMuls and Adds of the main graph. ``scale`` is always stated: 1/sqrt(d) where
    Attention left it to its default.

    Preconditions:

    1. Attention has no key/value cache and no soft cap, only its first output is used, and its operands have rank 4.
    2. Query, key and value have the same static number of heads and the same static head size.
    3. Each is a split: Reshape of rank 3 to rank 4 that keeps batch and sequence apart, then Transpose [0, 2, 1, 3].
    4. The output is merged: its only reader is Transpose [0, 2, 1, 3], whose only reader is a Reshape to rank 3 that
       keeps batch and sequence apart.

    Not matched: grouped-query attention, attention written as MatMul and Softmax.

    Attributes:
        required: refuse a graph without a single site.
    """

    required: bool = False
    name: ClassVar[str] = "fuse-attention"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Fuse all sites.

        Raises:
            PassError: none was fused although `required`.
        """
        matched = 0
        skipped: list[Skipped] = []
        for attention in [node for node in model.graph if is_operator(node, "Attention")]:
            found = _match(attention)
            if isinstance(found, str):
                skipped.append(Skipped(site(attention), found))
            else:
                _fuse(attention, found)
                matched += 1
        if matched:
            domain.import_operator(model, domain.MULTI_HEAD_ATTENTION)
        check_fused(self.name, count_fused(model, domain.MULTI_HEAD_ATTENTION), skipped, required=self.required)
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))


@dataclass(frozen=True)
class _Site:
    """What surrounds one Attention.

    Attributes:
        operands: query, key and value before their heads were split.
        merge: the Transpose and the Reshape behind it.
        num_heads: of query, key and value alike; likewise head_size.
    """

    operands: tuple[ir.Value, ir.Value, ir.Value]
    merge: tuple[ir.Node, ir.Node]
    num_heads: int
    head_size: int


def _match(attention: ir.Node) -> _Site | str:
    """The fused operator's operands, or why the site is left alone."""
    if reason := _unsupported_feature(attention):
        return reason
    heads_and_sizes = {_heads_and_size(value) for value in attention.inputs[:3]}
    if len(heads_and_sizes) > 1:
        return f"query, key and value have (heads, head size) {sorted(map(str, heads_and_sizes))}, expected equal ones"
    (found,) = heads_and_sizes
    if found is None:
        return "number of heads or head size is not static"
    operands = []
    for value in attention.inputs[:3]:
        operand = _before_split(value)
        if operand is None:
            return "query, key or value is not Transpose(Reshape(x)) from rank 3"
        operands.append(operand)
    merge = _merge_after(attention.outputs[0])
    if merge is None:
        return "the output is not merged by Transpose and Reshape to rank 3, or something else reads it"
    return _Site((operands[0], operands[1], operands[2]), merge, *found)


def _unsupported_feature(attention: ir.Node) -> str | None:
    if any(value is not None for value in attention.inputs[4:]):
        return "a key/value cache or padding lengths"
    if any(output.uses() or output.is_graph_output() for output in attention.outputs[1:]):
        return "outputs besides the first are used"
    if attention.attributes.get_float("softcap", 0.0) != 0.0:
        return "a soft cap"
    if any(len(dimensions(value) or ()) != 4 for value in attention.inputs[:3]):
        return "query, key or value is not known to have rank 4"
    return None


def _heads_and_size(value: ir.Value | None) -> tuple[int, int] | None:
    shape = dimensions(value)
    assert shape is not None
    heads, size = shape[1], shape[3]
    return (heads, size) if isinstance(heads, int) and isinstance(size, int) else None


def _is_head_transpose(node: ir.Node | None) -> bool:
    return node is not None and is_operator(node, "Transpose") and permutation(node) == _SPLIT


def _before_split(value: ir.Value | None) -> ir.Value | None:
    transpose = producer(value, "Transpose")
    if transpose is None or not _is_head_transpose(transpose):
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    if reshape is None or not _keeps_batch_and_sequence(reshape.inputs[0], reshape.outputs[0], ranks=(3, 4)):
        return None
    return reshape.inputs[0]


def _merge_after(value: ir.Value) -> tuple[ir.Node, ir.Node] | None:
    transpose = sole_consumer(value)
    if transpose is None or not _is_head_transpose(transpose):
        return None
    reshape = sole_consumer(transpose.outputs[0])
    if reshape is None or not is_operator(reshape, "Reshape"):
        return None
    if not _keeps_batch_and_sequence(transpose.outputs[0], reshape.outputs[0], ranks=(4, 3)):
        return None
    return transpose, reshape


def _keeps_batch_and_sequence(before: ir.Value | None, after: ir.Value, *, ranks: tuple[int, int]) -> bool:
    """Whether a Reshape only splits or merges the last dimensions.

    Its element count is kept, so with equal products behind them it is enough that one of batch and sequence is known
    to be kept: the other then is as well.
    """
    old, new = dimensions(before), dimensions(after)
    if old is None or new is None or (len(old), len(new)) != ranks:
        return False
    return _product(old[2:]) == _product(new[2:]) is not None and any(map(same_size, old[:2], new[:2]))


def _product(sizes: tuple[int | str | None, ...]) -> int | None:
    product = 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        product *= size
    return product


def _fuse(attention: ir.Node, found: _Site) -> None:
    transpose, reshape = found.merge
    mask = attention.inputs[3:4]
    fused = ir.node(
        domain.MULTI_HEAD_ATTENTION,
        [*found.operands, *(mask if mask and mask[0] is not None else [])],
        {
            "num_heads": found.num_heads,
            # Source: ONNX Attention-23, default of scale.
            "scale": attention.attributes.get_float("scale", found.head_size**-0.5),
            "is_causal": attention.attributes.get_int("is_causal", 0),
        },
        domain=domain.DOMAIN,
    )
    replace_nodes([attention, transpose, reshape], fused, reshape.outputs, at=reshape)
    fused.name = attention.name
