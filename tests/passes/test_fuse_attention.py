from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from equality import FP32, apply_proven, operators, relative_error, run_model
from small_graphs import ATTENTION, feed_attention, make_attention

from sdc.engines.errors import PassError
from sdc.passes.fusion.fuse_attention import FuseAttention

FEEDS = [feed_attention(), feed_attention(batch=1, tokens=23)]
MASKED = ATTENTION.replace("(q, k, v)", "(q, k, v, mask)")
SELF = ATTENTION.replace("MatMul (context, wk)", "MatMul (x, wq)").replace("MatMul (context, wv)", "MatMul (x, wq)")


def masked(kind: str) -> str:
    """Attention with a mask that hides the last tokens from the first queries, and one more from one of them."""
    visible = np.tril(np.ones((11, 7), bool))
    visible[8, 2] = False
    if kind == "bool":
        values = ", ".join(str(int(value)) for value in visible.flat)
        return MASKED.replace("int64[1] heads", f"bool[1, 1, 11, 7] mask = {{{values}}}, int64[1] heads")
    values = ", ".join(str(float(value)) for value in np.where(visible, 0.25, -3.5).flat)
    return MASKED.replace("int64[1] heads", f"float[11, 7] mask = {{{values}}}, int64[1] heads")


def test_attention_loses_its_transposes() -> None:
    model = make_attention()
    (report,) = apply_proven(FuseAttention(required=True), model, FEEDS)
    assert (report.matched, report.skipped) == (1, ())
    fused = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert [value.name for value in fused.inputs] == ["query", "key", "value"]
    assert {name: attribute.value for name, attribute in fused.attributes.items()} == {
        "num_heads": 3,
        "scale": pytest.approx(5**-0.5, rel=1e-7),
        "is_causal": 0,
    }


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_stays(kind: str) -> None:
    model = make_attention(masked(kind))
    (report,) = apply_proven(FuseAttention(), model, FEEDS[:1])
    assert report.matched == 1
    assert operators(model).count("Attention") == 0


@pytest.mark.parametrize("attributes", ["<is_causal = 1>", "<scale = 0.7>"])
def test_attributes_stay(attributes: str) -> None:
    model = make_attention(SELF.replace("Attention (", f"Attention {attributes} ("))
    assert apply_proven(FuseAttention(), model, FEEDS)[0].matched == 1


def test_shared_head_split_stays_for_its_other_reader() -> None:
    model = make_attention(
        ATTENTION.replace("y = MatMul (merged, wo)", "s = ReduceSum (q)  m = MatMul (merged, wo)  y = Add (m, s)")
    )
    apply_proven(FuseAttention(), model, FEEDS)
    assert operators(model).count("Attention") == 0


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Attention (q", "Attention <softcap = 2.0> (q", "soft cap"),
        ("attended = Attention (q, k, v)", "attended, present = Attention (q, k, v, , k, v)", "cache"),
        (
            "k = Transpose <perm = [0, 2, 1, 3]> (key4)",
            "k0 = Transpose <perm = [0, 2, 1, 3]> (key4)  k = Neg (k0)",
            "not Transpose(Reshape(x))",
        ),
        (
            "v = Transpose <perm = [0, 2, 1, 3]> (value4)",
            "v0 = Transpose <perm = [0, 1, 3, 2]> (value4)  v1 = Transpose <perm = [0, 3, 1, 2]> (v0) "
            "v = Transpose <perm = [0, 1, 2, 3]> (v1)",
            "not Transpose(Reshape(x))",
        ),
        (
            "y = MatMul (merged, wo)",
            "z = Neg (attended)  m = MatMul (merged, wo)  n = ReduceSum (z)  y = Add (m, n)",
            "the output is not merged",
        ),
        ("Reshape (back, merge)", "Reshape (back, mix)", "the output is not merged"),
    ],
    ids=["soft cap", "cache", "no split", "other transposes", "read before the merge", "merge mixes batch and tokens"],
)
def test_other_attention_says_why_it_stays(old: str, new: str, reason: str) -> None:
    text = ATTENTION.replace(old, new)
    if "mix" in new:
        # [B, S, 3, 5] → [S, B, 15]: a reshape, but none that keeps batch and tokens apart.
        text = text.replace(
            "merged =",
            "b = Shape <start = 0, end = 1> (x)  s = Shape <start = 1, end = 2> (x) "
            "mix = Concat <axis = 0> (s, b, width)  merged =",
        )
        text = text.replace("float[B, S, 10] y", "float[P, Q, 10] y")
    model = make_attention(text)
    report = FuseAttention().run(model)
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True]
    assert operators(model).count("Attention") == 1


def test_grouped_queries_are_left_alone() -> None:
    text = ATTENTION.replace("Reshape (key, split)", "Reshape (key, wide)").replace(
        "Reshape (value, split)", "Reshape (value, wide)"
    )
    text = text.replace("int64[1] heads", "int64[4] wide = {0, 0, 1, 15}, int64[1] heads")
    (skipped,) = FuseAttention().run(make_attention(text)).skipped
    assert "(heads, head size)" in skipped.reason


def test_graph_without_attention_is_an_error_where_one_is_known_to_be() -> None:
    text = ATTENTION.replace("attended = Attention (q, k, v)", "attended = Add (q, q)")
    with pytest.raises(PassError, match="nothing that looks like one"):
        FuseAttention(required=True).run(make_attention(text))


def swap_key_and_value(node: ir.Node) -> None:
    key, value = node.inputs[1:3]
    node.replace_input_with(1, value)
    node.replace_input_with(2, key)


def merge_heads(node: ir.Node) -> None:
    node.attributes["num_heads"] = ir.AttrInt64("num_heads", 1)


def forget_scale(node: ir.Node) -> None:
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)


@pytest.mark.parametrize("break_node", [swap_key_and_value, merge_heads, forget_scale])
def test_equality_sees_a_broken_fusion(break_node: Callable[[ir.Node], None]) -> None:
    model = make_attention()
    expected = run_model(model, FEEDS[0])
    FuseAttention().run(model)
    break_node(next(node for node in model.graph if node.op_type == "MultiHeadAttention"))
    assert relative_error(model, expected, FEEDS[0]) > 100 * FP32


def test_equality_sees_a_wrong_axis() -> None:
    # As many tokens as heads: the shapes fit even if the two are mistaken for each other.
    feeds = feed_attention(tokens=3)
    model = make_attention()
    expected = run_model(model, feeds)
    FuseAttention().run(model)
    (function,) = model.functions.values()
    for node in function:
        if node.op_type == "Transpose" and node.outputs[0].name in ("q", "context_split"):
            node.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 2, 3])
    assert relative_error(model, expected, feeds) > 100 * FP32
