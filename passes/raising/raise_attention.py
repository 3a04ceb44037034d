"""Recognise attention that is written as MatMul, Softmax and MatMul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import dimensions, is_operator, site, sole_consumer
from sdc.passes.raising.attention_operands import Operand, read_operand, read_transposed, unfold_heads
from sdc.passes.raising.attention_scores import Scores, read_scores, read_weighted_sum
from sdc.passes.raising.attention_site import AttentionSite, replace_by_attention
from sdc.passes.raising.causal_pattern import is_causal_mask


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Every scaled dot-product attention is one node `Attention` of rank 4.

    Source: Vaswani et al., arXiv:1706.03762, equation 1.

    Before → after, with q: [B, h, S, d], k and v: [B, h, T, d]::

        y = MatMul(Softmax(a * MatMul(b * q, Transpose(c * k)) + mask), v)
            →  y = Attention(q, k, v, mask), scale = a * b * c
        Attention(q, k, v, mask), mask causal
            →  Attention(q, k, v), is_causal = 1

    Numbers may be multiplied or divided by on either operand, before the heads are split, or on the scores, and
    conversions between floating-point types may stand anywhere: the scores' product keeps its type, and the Softmax is
    one that accumulates in float32 (see `sdc.passes.domain`). The scale is left out where it is the default,
    1 / sqrt(d). The keys' transposition may be merged with that of the head split or stand between Reshapes.

    - A mask is added, or a condition that chooses between scores and a very negative number. A causal one becomes
      ``is_causal``, and a torch guard against NaN rows, ``Where(IsNaN(p), 0, p)``, goes.
    - Heads that are folded into the batch, q: [B * h, S, d], are found before the fold, and the Reshape that unfolds
      the result goes. Without any fold, q: [B, S, d] is attention with one head, and gets its split and merge.

    Preconditions:

    1. Softmax is over the last dimension of rank 3 or 4, and only one MatMul reads it, as its left operand.
    2. Between MatMul and Softmax stand only numbers, conversions and one mask that is not scaled with the scores.
    3. The sizes of q, k and v are known and fit, none is repeated along batch or heads; head size and number of heads
       are numbers.
    4. A mask has a row for each query and a column for each key. One by Where hides with a number so low that a score
       is lost beside it (-1e9; -6e4 in float16), or is causal: a row that hides all keys averages the values.
    5. With folded heads, q, k and v are folded from the same number of heads, a mask has no axis of batch or heads, and
       the only reader of the result unfolds it.

    Not matched: grouped queries, soft caps, dropout, attention whose probabilities are an output.
    """

    name: ClassVar[str] = "raise-attention"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites; a Softmax in front of a MatMul that stays is reported as skipped."""
        matched = causal = 0
        skipped: list[Skipped] = []
        for attention in [node for node in model.graph if is_operator(node, "Attention")]:
            causal += _drop_causal_mask(attention)
        for softmax in [node for node in model.graph if is_operator(node, "Softmax")]:
            found = _match(softmax)
            if isinstance(found, str):
                skipped.append(Skipped(site(softmax), found))
            elif found is not None:
                causal += replace_by_attention(model.graph, softmax, found)
                matched += 1
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped), details={"causal": causal})


def _drop_causal_mask(attention: ir.Node) -> bool:
    """Let an Attention with a causal mask be causal itself; whether it had one."""
    mask = attention.inputs[3] if len(attention.inputs) > 3 else None
    if mask is None or not is_causal_mask(mask) or any(value is not None for value in attention.inputs[4:]):
        return False
    attention.resize_inputs(3)
    attention.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    return True


def _match(softmax: ir.Node) -> AttentionSite | str | None:
    shape = dimensions(softmax.inputs[0])
    total = read_weighted_sum(softmax)
    if total is None or total.inputs[1] is None:
        return None
    if shape is None or len(shape) not in (3, 4):
        return f"the scores have shape {shape}, expected rank 3 or 4"
    if softmax.attributes.get_int("axis", -1) % len(shape) != len(shape) - 1:
        return "Softmax is not over the last dimension"
    scores = read_scores(softmax.inputs[0])
    if isinstance(scores, str):
        return scores
    left, right = scores.product.inputs
    assert left is not None
    assert right is not None
    query, key, value = read_operand(left), read_transposed(right), read_operand(total.inputs[1])
    if value.scale != 1.0:
        value = Operand(total.inputs[1])  # a number on the values is no part of attention
    output = total.outputs[0]
    if len(shape) == 3:
        unfolded = [unfold_heads(operand) for operand in (query, key, value)]
        if None not in unfolded:
            query, key, value = unfolded  # type: ignore[assignment]
            reader = sole_consumer(output)
            if reader is None or not is_operator(reader, "Reshape"):
                return "the heads of the result are not unfolded, or something else reads it"
            output = reader.outputs[0]
    found = AttentionSite(query, key, value, scores, total, output)
    return _reason_against(found) or found


def _hides_whole_rows(scores: Scores) -> bool:
    """Whether ``Where(allowed, scores, fill)`` may be written as a sum with 0 or the fill, even in rows that hide all.

    There, the sum must round to the fill. In a causal mask no row hides all.
    """
    if scores.allowed is None or is_causal_mask(scores.allowed, allows=scores.allowed_when):
        return True
    lowest = -6e4 if scores.product.outputs[0].dtype == ir.DataType.FLOAT16 else -1e9
    return scores.fill <= lowest


def _reason_against(found: AttentionSite) -> str | None:
    query, key, value = (operand.sizes for operand in (found.query, found.key, found.value))
    rank = len(query)
    if not len(query) == len(key) == len(value) or rank not in (3, 4) or None in (*query, *key, *value):
        return f"query, key and value have shapes {query}, {key} and {value}"
    if not isinstance(query[-1], int) or query[-1] != key[-1] or key[-2] != value[-2] or query[0] != key[0]:
        return f"shapes {query}, {key} and {value} do not fit"
    if key[0] != value[0] or (rank == 4 and (not isinstance(query[1], int) or not query[1] == key[1] == value[1])):
        return f"batch or heads of {query}, {key} and {value} differ"
    mask = dimensions(found.scores.mask or found.scores.allowed)
    folded = len(dimensions(found.total.outputs[0]) or ()) == 3
    if (found.scores.mask or found.scores.allowed) is not None:
        if mask is None or len(mask) < 2:
            return f"the mask has shape {mask}"
        if mask[-2] == 1 and found.query.sizes[-2] != 1:
            return f"the mask's shape {mask} is one row for all queries, which runtimes refuse"
        if mask[-1] == 1 and found.key.sizes[-2] != 1:
            return f"the mask's shape {mask} is one column for all keys, which runtimes refuse"
        if folded and any(size != 1 for size in mask[:-2]):
            return f"the mask's shape {mask} has an axis for batch or heads, which are folded together"
        if not _hides_whole_rows(found.scores):
            return f"hidden scores are {found.scores.fill:g}: too near to the others' for a row that hides all keys"
    result = dimensions(found.output)
    if result != (*query[:-1], value[-1]):
        return f"the result has shape {result}, expected {(*query[:-1], value[-1])}"
    return None
