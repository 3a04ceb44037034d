"""Map fused attention to ONNX Runtime's own operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import dimensions, replace_nodes, same_size, site

ORT_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class LowerMultiHeadAttention(Pass):
    """Fused attention without a mask becomes com.microsoft.MultiHeadAttention.

    Before → after::

        y = sdc.MultiHeadAttention(q, k, v)  →  y = com.microsoft.MultiHeadAttention(q, k, v)

    ONNX Runtime runs it as flash attention on the CPU too: in blocks, without the [B, heads, S, S] scores that its
    standard Attention writes to memory, and on [B, S, heads * head_size] without transposes.

    Preconditions:

    1. No mask, and not causal unless `causal` is set: the CPU's kernel has no such attribute.
    2. A causal one is known to have as many keys as queries: flash attention lets the last query see the last key, as
       decoding with a cache wants it; Attention lets the first query see the first key.
    3. The element type is one of `dtypes`: on the CPU the operator has a kernel for float32 alone.

    Not matched: what fails these; it is inlined to standard Attention later.

    Source: ONNX Runtime, docs/ContribOperators.md, com.microsoft.MultiHeadAttention.

    Attributes:
        dtypes: element types that the provider has a kernel for.
        causal: whether the provider's kernel takes ``unidirectional``.
    """

    dtypes: frozenset[ir.DataType] = frozenset({ir.DataType.FLOAT})
    causal: bool = False
    name: ClassVar[str] = "lower-multi-head-attention"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites."""
        matched = 0
        skipped: list[Skipped] = []
        for node in [node for node in model.graph if domain.is_fused(node, domain.MULTI_HEAD_ATTENTION)]:
            if reason := self._reason_against(node):
                skipped.append(Skipped(site(node), reason))
                continue
            attributes = {
                "num_heads": node.attributes["num_heads"].as_int(),
                "scale": node.attributes["scale"].as_float(),
                **({"unidirectional": 1} if node.attributes["is_causal"].as_int() else {}),
            }
            lowered = ir.node(domain.MULTI_HEAD_ATTENTION, node.inputs[:3], attributes, domain=ORT_DOMAIN)
            replace_nodes([node], lowered, node.outputs, at=node)
            matched += 1
        if matched:
            model.graph.opset_imports[ORT_DOMAIN] = 1
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))

    def _reason_against(self, node: ir.Node) -> str | None:
        if any(value is not None for value in node.inputs[3:]):
            return "masked"
        if node.attributes["is_causal"].as_int() and not self.causal:
            return "causal"
        if node.attributes["is_causal"].as_int() and not _as_many_keys_as_queries(node):
            return "causal, and not known to have as many keys as queries"
        dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
        expected = " or ".join(sorted(each.name for each in self.dtypes))
        return None if dtype in self.dtypes else f"query is {dtype and dtype.name}, expected {expected}"


def _as_many_keys_as_queries(node: ir.Node) -> bool:
    query, key = dimensions(node.inputs[0]), dimensions(node.inputs[1])
    return query is not None and key is not None and same_size(query[1], key[1])
