"""Each raise pass, broken in the ways in which it could have been, fails the proof that it passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from attention_graph import CAUSAL, FOLDED, PASSES, SCORES, VISIBLE, attention, masked, replaced
from attention_graph import FEEDS as ATTENTION_FEEDS
from broken import (
    Broken,
    Case,
    attribute,
    check_noticed,
    names,
    operand_values,
    patched,
    renamed,
    swapped,
    without_operand,
)
from equality import make_model
from small_graphs import normal
from test_raise_activations import ERF, HEAD, QUICK, TANH, halves
from test_raise_activations import FEEDS as ACTIVATION_FEEDS
from test_raise_norms import GROUP_FEEDS, LAYER_FEEDS, group_norm, layer_norm

from sdc.passes import domain
from sdc.passes.base import Pass
from sdc.passes.raising.raise_attention import RaiseAttention
from sdc.passes.raising.raise_gelu import RaiseGelu
from sdc.passes.raising.raise_group_norm import RaiseGroupNorm
from sdc.passes.raising.raise_layer_norm import RaiseLayerNorm
from sdc.passes.raising.raise_quick_gelu import RaiseQuickGelu
from sdc.passes.raising.raise_silu import RaiseSilu
from sdc.passes.raising.raise_split import RaiseSplit
from sdc.passes.shapes.resolve_shapes import ResolveShapes
from sdc.passes.simplify.cancel_no_ops import CancelNoOps
from sdc.passes.simplify.remove_unused import RemoveUnused

OTHER_SCALE = replaced(("Mul (raw, scale)", "Mul (raw, other)"))
BOTH_SCALED = replaced((SCORES, "qs = Mul (q, root)\n ks = Mul (k, other)\n scores = MatMul (qs, ks)"))
ADDED = masked("scores = Add (scaled, mask)")
CHOSEN = masked("scores = Where (mask, scaled, hidden)")
SINGLE = """{
    query = MatMul (x, wq)  key = MatMul (context, wk)  value = MatMul (context, wv)
    k = Transpose <perm = [0, 2, 1]> (key)  raw = MatMul (query, k)  scores = Mul (raw, other)
    probabilities = Softmax (scores)  attended = MatMul (probabilities, value)  y = MatMul (attended, wo)
}"""


def raises_attention(body: str, kinds: dict[str, Broken], mask: np.ndarray | None = None) -> Case:
    masks = {} if mask is None else {"mask": mask}
    passes = (ResolveShapes(), CancelNoOps(), *PASSES)
    return Case(lambda: attention(body, masks=masks), ATTENTION_FEEDS, passes, kinds, RaiseAttention)


def raises(body: str, kinds: dict[str, Broken], wanted: Pass) -> Case:
    return Case(lambda: make_model(HEAD + body, {}), ACTIVATION_FEEDS, (wanted, RemoveUnused()), kinds)


def forgotten(op_type: str) -> Broken:
    """The Mul or Add behind a group norm goes, but its operand is not kept."""

    def exchange(take: Callable[..., np.ndarray | None]) -> Callable[..., np.ndarray | None]:
        def take_nothing(chain: list[ir.Node], kind: str, channels: int) -> np.ndarray | None:
            found = take(chain, kind, channels)
            return None if kind == op_type else found

        return take_nothing

    return patched("raising.raise_group_norm:_take_operand", exchange)


def unscaled(target: str) -> Broken:
    """What a function reads has lost its scale."""
    return patched(target, lambda read: lambda value: replace(read(value), scale=1.0))


def other_half(half: Callable[[ir.Node], tuple[int, int] | None]) -> Callable[[ir.Node], tuple[int, int] | None]:
    """The first half of an axis is taken for the second."""

    def exchanged(node: ir.Node) -> tuple[int, int] | None:
        found = half(node)
        return None if found is None else (found[0], 1 - found[1])

    return exchanged


HEADS = operand_values("Reshape", 1, lambda to: to[[0, 1, 3, 2]] if to.size == 4 else to)
"""Five heads of three instead of three of five."""

CASES = {
    "attention": raises_attention(
        OTHER_SCALE,
        {
            "scale dropped": attribute("Attention", "scale", None),
            "scale of another size": attribute("Attention", "scale", 0.25),
            "scale not read": patched(
                "raising.raise_attention:read_scores", lambda read: lambda value: replace(read(value), scale=1.0)
            ),
            "keys and values swapped": swapped("Attention", 1, 2),
            "heads of other sizes": HEADS,
            "causal": attribute("Attention", "is_causal", 1),
        },
    ),
    "attention, query and key scaled": raises_attention(
        BOTH_SCALED,
        {
            "scale of the query forgotten": patched(
                "raising.raise_attention:read_operand", lambda read: lambda value: replace(read(value), scale=1.0)
            ),
            "scale of the key forgotten": patched(
                "raising.raise_attention:read_transposed", lambda read: lambda value: replace(read(value), scale=1.0)
            ),
        },
    ),
    "attention, added mask": raises_attention(
        ADDED,
        {
            "mask dropped": without_operand("Attention", 3),
            "taken for causal": patched("raising.attention_site:is_causal_mask", lambda _: lambda *_, **__: True),
        },
        normal(9, 11, 7),
    ),
    "attention, chosen mask": raises_attention(
        CHOSEN,
        {
            "mask dropped": without_operand("Attention", 3),
            "mask inverted": swapped("Where", 1, 2),
        },
        VISIBLE,
    ),
    "attention, causal mask": raises_attention(
        ADDED, {"causal lost": attribute("Attention", "is_causal", None)}, np.where(CAUSAL, 0, -1e4).astype(np.float32)
    ),
    "attention, folded heads": raises_attention(
        FOLDED,
        {
            "keys and values swapped": swapped("Attention", 1, 2),
            "heads of other sizes": HEADS,
        },
    ),
    "attention, single head": raises_attention(
        SINGLE,
        {
            "three heads": operand_values("Reshape", 1, lambda to: np.array([0, 0, 3, 5]) if to.size == 4 else to),
            "scale dropped": attribute("Attention", "scale", None),
        },
    ),
    "group norm": Case(
        group_norm,
        GROUP_FEEDS,
        (RaiseGroupNorm(), RemoveUnused()),
        {
            "epsilon dropped": attribute("GroupNormalization", "epsilon", 0.0),
            "epsilon left to its default": attribute("GroupNormalization", "epsilon", None),
            "one group": attribute("GroupNormalization", "num_groups", 1),
            "groups of one channel": attribute("GroupNormalization", "num_groups", 6),
            "gamma and beta swapped": swapped("GroupNormalization", 1, 2),
            "gamma forgotten": forgotten("Mul"),
            "beta forgotten": forgotten("Add"),
        },
    ),
    "layer norm": Case(
        layer_norm,
        LAYER_FEEDS,
        (RaiseLayerNorm(), RemoveUnused()),
        {
            "epsilon dropped": attribute("LayerNormalization", "epsilon", 0.0),
            "epsilon left to its default": attribute("LayerNormalization", "epsilon", None),
            "two axes": attribute("LayerNormalization", "axis", 1),
            "gamma and beta swapped": swapped("LayerNormalization", 1, 2),
        },
    ),
    "Gelu by erf": raises(ERF, {"tanh": attribute("Gelu", "approximate", "tanh")}, RaiseGelu()),
    "Gelu by tanh": raises(TANH, {"erf": attribute("Gelu", "approximate", None)}, RaiseGelu()),
    "QuickGelu": raises(
        QUICK,
        {"factor forgotten": renamed("QuickGelu", domain.SILU, fused=True), "Gelu": renamed("QuickGelu", "Gelu")},
        RaiseQuickGelu(),
    ),
    "Silu": raises(
        "{ gate = Sigmoid (x)  y = Mul (x, gate) }",
        {
            "gate alone": renamed("Silu", "Sigmoid"),
            "with a factor": renamed("Silu", domain.QUICK_GELU, fused=True),
        },
        RaiseSilu(),
    ),
    "Split": Case(
        halves,
        [{"x": normal(1, batch, 3, 10)} for batch in (2, 7)],
        (RaiseSplit(),),
        {
            "halves swapped": patched("raising.raise_split:_half", other_half),
        },
    ),
}


@pytest.mark.parametrize(("name", "kind"), names(CASES))
def test_broken_pass_is_noticed(name: str, kind: str) -> None:
    check_noticed(CASES[name], kind)
