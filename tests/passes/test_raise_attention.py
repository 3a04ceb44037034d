"""Attention in the spellings of exporters, with every precondition broken once."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from attention_graph import (
    BODY,
    FEEDS,
    FOLDED,
    HEAD,
    PASSES,
    SCORES,
    VISIBLE,
    attention,
    masked,
    raised,
    replaced,
)
from equality import FP32, apply_proven, make_model, operators, relative_error, run_model
from small_graphs import normal

from sdc.passes.fusion.fuse_attention import FuseAttention
from sdc.passes.raising.raise_attention import RaiseAttention
from sdc.passes.shapes.resolve_shapes import ResolveShapes
from sdc.passes.simplify.cancel_no_ops import CancelNoOps
from sdc.passes.simplify.remove_unused import RemoveUnused


@pytest.mark.parametrize(
    "body",
    [
        BODY,
        replaced(("Mul (raw, scale)", "Div (raw, inverse)")),
        replaced(("Mul (raw, scale)", "Mul (scale, raw)")),
        replaced((SCORES, "qs = Mul (q, scale)\n scores = MatMul (qs, k)")),
        replaced((SCORES, "ks = Div (k, inverse)\n scores = MatMul (q, ks)")),
        replaced((SCORES, "qs = Mul (q, root)\n ks = Mul (k, root)\n scores = MatMul (qs, ks)")),
        replaced(
            (SCORES, "ks = Mul (kn, scale)\n kt = Transpose <perm = [0, 1, 3, 2]> (ks)\n scores = MatMul (q, kt)"),
            ("k = Transpose <perm = [0, 2, 3, 1]>", "kn = Transpose <perm = [0, 2, 1, 3]>"),
        ),
        replaced(
            (SCORES, "scores = MatMul (q, k)"),
            ("Reshape (query, split)", "Reshape (scaled, split)"),
            ("query4 =", "scaled = Mul (query, scale)\n query4 ="),
        ),
        replaced(
            (
                SCORES,
                "kf = Reshape (kn, fold_keys)\n kt = Transpose <perm = [0, 2, 1]> (kf)\n"
                " ku = Reshape (kt, unfold_keys)\n raw = MatMul (q, ku)\n scores = Mul (raw, scale)",
            ),
            ("k = Transpose <perm = [0, 2, 3, 1]>", "kn = Transpose <perm = [0, 2, 1, 3]>"),
        ),
        FOLDED,
        FOLDED.replace("Reshape (q, fold)", "Reshape (qs, fold)")
        .replace("qf =", "qs = Mul (q, scale)\n qf =")
        .replace("Mul (raw, scale)", "Identity (raw)"),
    ],
    ids=[
        "scores",
        "div",
        "other order",
        "query",
        "key",
        "both",
        "before transposing",
        "before the split",
        "torch's folds",
        "folded heads",
        "folded heads, scaled query",
    ],
)
def test_spellings_are_one_attention_that_fuses(body: str) -> None:
    model = attention(body)
    reports = apply_proven((ResolveShapes(), CancelNoOps(), *PASSES), model, FEEDS)
    assert (reports[2].matched, reports[2].skipped) == (1, ())
    assert operators(model).count("Softmax") == 0
    assert "scale" not in raised(model).attributes
    assert apply_proven((FuseAttention(), RemoveUnused()), model, FEEDS)[0].matched == 1
    assert operators(model) == ["MatMul", "MatMul", "MatMul", "sdc.MultiHeadAttention", "MatMul"]


def test_other_scale_is_stated() -> None:
    model = attention(replaced(("Mul (raw, scale)", "Mul (raw, other)")))
    apply_proven(PASSES, model, FEEDS)
    assert raised(model).attributes["scale"].as_float() == pytest.approx(0.3)


def test_attention_without_scale_has_scale_one() -> None:
    model = attention(replaced((SCORES, "scores = MatMul (q, k)")))
    apply_proven(PASSES, model, FEEDS)
    assert raised(model).attributes["scale"].as_float() == 1.0


def test_numbers_on_the_values_stay_outside() -> None:
    model = attention(
        replaced(("MatMul (probabilities, v)", "MatMul (probabilities, vs)"), ("raw =", "vs = Mul (v, other)\n raw ="))
    )
    apply_proven(PASSES, model, FEEDS)
    assert operators(model).count("Mul") == 1


def test_keys_that_were_not_transposed_get_a_transpose() -> None:
    body = replaced(
        ("k = Transpose <perm = [0, 2, 3, 1]> (key4)", "kn = Transpose <perm = [0, 2, 3, 1]> (key4)\n k = Tanh (kn)")
    )
    model = attention(body)
    assert apply_proven(PASSES, model, FEEDS)[0].matched == 1


def test_single_head_without_split_gets_split_and_merge() -> None:
    body = """{
        query = MatMul (x, wq)  key = MatMul (context, wk)  value = MatMul (context, wv)
        k = Transpose <perm = [0, 2, 1]> (key)  raw = MatMul (query, k)  scores = Mul (raw, other)
        probabilities = Softmax (scores)  attended = MatMul (probabilities, value)  y = MatMul (attended, wo)
    }"""
    model = attention(body)
    apply_proven(PASSES, model, FEEDS)
    assert apply_proven((FuseAttention(), RemoveUnused()), model, FEEDS)[0].matched == 1
    assert operators(model) == ["MatMul", "MatMul", "MatMul", "sdc.MultiHeadAttention", "MatMul"]


VISIBLE[4, 2] = VISIBLE[0, 5:] = False


def test_keys_turned_by_the_default_order() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]>
    attention (float[2, 6, 4] q, float[6, 4, 2] k, float[2, 6, 3] v) => (float[2, 6, 3] y) {
        turned = Transpose (k)
        raw = MatMul (q, turned)
        probabilities = Softmax <axis = -1> (raw)
        y = MatMul (probabilities, v)
    }"""
    feeds = [{"q": normal(1, 2, 6, 4), "k": normal(2, 6, 4, 2), "v": normal(3, 2, 6, 3)}]
    apply_proven(PASSES, make_model(text, {}), feeds)


def in_half(body: str) -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    weights = {"wq": normal(1, 10, 15), "wk": normal(2, 9, 15), "wv": normal(3, 9, 15), "wo": normal(4, 15, 10)}
    weights |= {"scale": np.array(5**-0.5), "wide_scale": np.array(5**-0.5)}
    text = re.sub(r"float (\w+) = \{[-\d.e]+\},?\s*", "", HEAD).replace("float[", "float16[") + body
    arrays = {
        n: w.astype(np.float32 if n == "wide_scale" else np.float16)
        for n, w in weights.items()
        if re.search(rf"\b{n}\b", text)
    }
    return make_model(text, arrays), [
        {name: value.astype(np.float16) for name, value in each.items()} for each in FEEDS
    ]


HALF = 5e-3


"""Scores of a few units that are rounded to 2^-11 come back as the probabilities' relative error."""


def test_softmax_in_single_precision_of_half_scores() -> None:
    model, feeds = in_half(
        replaced(
            ("Softmax <axis = -1> (scores)", "Softmax <axis = -1> (wide)\n narrow = Cast <to = 10> (probabilities)"),
            ("probabilities =", "wide = Cast <to = 1> (scores)\n probabilities ="),
            ("MatMul (probabilities, v)", "MatMul (narrow, v)"),
        )
    )
    apply_proven(PASSES, model, feeds, tolerance=HALF)
    assert operators(model).count("Cast") == 0
    assert raised(model).outputs[0].dtype == ir.DataType.FLOAT16


def test_scores_in_single_precision_of_half_operands_stay_so() -> None:
    model, feeds = in_half(
        replaced(
            (
                SCORES,
                (
                    "qw = Cast <to = 1> (q)\n kw = Cast <to = 1> (k)\n raw = MatMul (qw, "
                    "kw)\n scores = Mul (raw, wide_scale)"
                ),
            ),
            ("MatMul (probabilities, v)", "MatMul (narrow, v)"),
            ("attended =", "narrow = Cast <to = 10> (probabilities)\n attended ="),
        )
    )
    apply_proven(PASSES, model, feeds, tolerance=HALF)
    assert raised(model).outputs[0].dtype == ir.DataType.FLOAT
    assert apply_proven((FuseAttention(), RemoveUnused()), model, feeds, tolerance=HALF)[0].matched == 1
    assert operators(model).count("Cast") == 4


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (replaced(("Softmax <axis = -1>", "Softmax <axis = 1>")), "not over the last dimension"),
        (replaced((SCORES, "raw = MatMul (q, k)\n scores = Tanh (raw)")), "Tanh stands between"),
        (masked("one = Add (scaled, mask)\n scores = Add (one, mask)"), "several masks"),
        (
            replaced((SCORES, "raw = MatMul (q, k)\n more = Add (raw, mask)\n scores = Mul (more, scale)")),
            "scaled with the scores",
        ),
        (masked("scores = Where (condition, scaled, zero)"), "Where stands between"),
        (
            replaced((SCORES, "raw = MatMul (q, k)\n second = Mul (raw, other)\n scores = Add (raw, second)")),
            "Add stands between",
        ),
        (
            FOLDED.replace(
                "attended = Reshape (folded, unfold)", "turned = Tanh (folded)\n attended = Reshape (turned, unfold)"
            ),
            "not unfolded",
        ),
        (
            FOLDED.replace("scores = Mul (raw, scale)", "scaled = Mul (raw, scale)\n scores = Add (scaled, heads)"),
            "has an axis for batch or heads",
        ),
    ],
)
def test_what_is_no_attention_says_why_it_stays(body: str, reason: str) -> None:
    masks = {"mask": normal(9, 11, 7), "condition": VISIBLE, "heads": normal(9, 9, 11, 7)}
    model = attention(body, masks=masks)
    ResolveShapes().run(model)
    before = operators(model)
    (report,) = apply_proven(RaiseAttention(), model, FEEDS[:1])
    assert report.matched == 0
    assert reason in report.skipped[0].reason
    assert operators(model) == before


@pytest.mark.parametrize(
    "body",
    [
        replaced(
            ("MatMul (probabilities, v)", "MatMul (turned, v)"),
            ("attended =", "turned = Neg (probabilities)\n attended ="),
        ),
        replaced(
            (
                "y = MatMul (merged, wo)",
                "out = MatMul (merged, wo)\n sum = ReduceSum <keepdims = 0> (probabilities)\n y = Add (out, sum)",
            )
        ),
    ],
    ids=["probabilities are changed", "probabilities are read"],
)
def test_probabilities_that_are_not_only_multiplied_do_not_look_like_attention(body: str) -> None:
    model = attention(body)
    (report,) = apply_proven(RaiseAttention(), model, FEEDS)
    assert (report.matched, report.skipped) == (0, ())


def test_scaled_projection_that_something_else_reads_keeps_its_number() -> None:
    body = replaced(
        (SCORES, "scores = MatMul (q, k)"),
        ("Reshape (query, split)", "Reshape (scaled, split)"),
        ("query4 =", "scaled = Mul (query, scale)\n query4 ="),
        ("y = MatMul (merged, wo)", "m = MatMul (merged, wo)\n s = ReduceSum <keepdims = 0> (q)\n y = Add (m, s)"),
    )
    model = attention(body)
    apply_proven(PASSES, model, FEEDS)
    assert raised(model).attributes.get_float("scale", 5**-0.5) == pytest.approx(0.4472136)


def test_query_that_is_the_key_as_well_keeps_both_numbers() -> None:
    body = replaced(
        (SCORES, "scores = MatMul (q, k)"),
        ("Reshape (query, split)", "Reshape (scaled, split)"),
        ("query4 =", "scaled = Mul (query, other)\n query4 ="),
        ("q = Transpose <perm = [0, 2, 1, 3]> (query4)", "q0 = Transpose <perm = [0, 2, 1, 3]> (query4)"),
        ("k = Transpose <perm = [0, 2, 3, 1]> (key4)", "q = Mul (q0, root)\n k = Transpose <perm = [0, 1, 3, 2]> (q)"),
        ("key = MatMul (context, wk)", ""),
        ("key4 = Reshape (key, split)", ""),
        ("MatMul (context, wv)", "MatMul (x, wk2)"),
        ("y = MatMul (merged, wo)", "m = MatMul (merged, wo)\n s = ReduceSum <keepdims = 0> (q)\n y = Add (m, s)"),
    )
    model = attention(body, masks={"wk2": normal(8, 10, 15)})
    apply_proven(PASSES, model, FEEDS)
    assert raised(model).attributes["scale"].as_float() == pytest.approx((0.3 * 0.66874030) ** 2)


def test_swapping_keys_and_values_would_show() -> None:
    model = attention(replaced(("MatMul (context, wv)", "MatMul (context, wk)")))
    expected = run_model(attention(), FEEDS[0])
    assert relative_error(model, expected, FEEDS[0]) > 100 * FP32
