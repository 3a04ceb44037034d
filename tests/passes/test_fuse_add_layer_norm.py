from __future__ import annotations

import pytest
from equality import apply_proven, operators, relative_error, run_model
from transformer_graph import FEEDS, TRANSFORMER, make_transformer

from sdc.passes.fusion.fuse_add_layer_norm import FuseAddLayerNorm
from sdc.passes.precision.cast_fp16 import CastFp16

NORM = "LayerNormalization <axis = -1, epsilon = 1e-3> (sum1, gamma1, beta1)"


def test_bias_residual_and_norm_become_one_node_that_gives_the_sum() -> None:
    model = make_transformer()
    (report,) = apply_proven(FuseAddLayerNorm(), model, FEEDS)
    assert (report.matched, report.skipped, report.details) == (1, (), {"forms": {"bias_residual": 1}})
    assert operators(model)[5:8] == ["MatMul", "sdc.BiasAddLayerNorm", "MatMul"]
    (fused,) = (node for node in model.graph if node.domain == "sdc")
    assert [value.name for value in fused.inputs] == ["product1", "b1", "tokens", "gamma1", "beta1"]
    assert [value.name for value in fused.outputs] == ["normed1", "sum1"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sum1 = Add (biased1, tokens)", "sum1 = Add (tokens, biased1)"),
        ("biased1 = Add (product1, b1)", "biased1 = Add (b1, product1)"),
        ("axis = -1, epsilon = 1e-3> (sum1", "axis = 2, epsilon = 1e-3> (sum1"),
        ("axis = -1, epsilon = 1e-3> (sum1", "axis = -1> (sum1"),
    ],
)
def test_other_spellings_are_the_same_site(old: str, new: str) -> None:
    model = make_transformer(TRANSFORMER.replace(old, new))
    (report,) = apply_proven(FuseAddLayerNorm(), model, FEEDS)
    assert report.details == {"forms": {"bias_residual": 1}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("biased1 = Add (product1, b1)", "biased1 = Neg (product1)"),
        ("biased1 = Add (product1, b1)", "neg1 = Neg (product1)  biased1 = Add (neg1, b1)"),
        ("biased1 = Add (product1, b1)", "b1c = Neg (b1)  biased1 = Add (product1, b1c)"),
        ("gated = Mul (value, active)", "m = ReduceMean (biased1)  g2 = Mul (value, active)  gated = Mul (g2, m)"),
    ],
    ids=["no bias", "no MatMul", "computed bias", "biased product is read elsewhere"],
)
def test_without_a_bias_of_its_own_the_residual_is_fused(old: str, new: str) -> None:
    model = make_transformer(TRANSFORMER.replace(old, new))
    (report,) = apply_proven(FuseAddLayerNorm(), model, FEEDS)
    assert report.details == {"forms": {"residual": 1}}
    assert "sdc.AddLayerNorm" in operators(model)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (NORM, "LayerNormalization <axis = 1, epsilon = 1e-3> (sum1, g2, be2)", "from axis 1 on"),
        (NORM, "LayerNormalization <epsilon = 1e-3> (sum1, gamma1)", "missing or computed"),
        (NORM, "LayerNormalization <epsilon = 1e-3> (sum1, gamma1, b1c)", "missing or computed"),
        (NORM, "LayerNormalization <stash_type = 10> (sum1, gamma1, beta1)", "statistics in FLOAT16"),
        (
            "sum1 = Add (biased1, tokens)",
            "row = ReduceMean (tokens, keep)  sum1 = Add (biased1, row)",
            "not known to be equal",
        ),
    ],
)
def test_site_that_cannot_be_fused_says_why(old: str, new: str, reason: str) -> None:
    text = TRANSFORMER.replace(old, new)
    text = text.replace("normed1 =", "b1c = Neg (beta1)  normed1 =") if "b1c" in new else text
    if "g2" in new:
        text = text.replace("normed1 =", "g2 = Sigmoid (tokens)  be2 = Neg (tokens)  normed1 =")
    model = make_transformer(text)
    report = FuseAddLayerNorm().run(model)
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True]


def test_statistics_that_are_read_keep_the_norm() -> None:
    text = TRANSFORMER.replace("normed1 = Layer", "normed1, mean1 = Layer")
    text = text.replace("gated = Mul (value, active)", "g2 = Mul (value, active)  gated = Mul (g2, mean1)")
    report = FuseAddLayerNorm().run(make_transformer(text))
    assert ["outputs besides the first" in each.reason for each in report.skipped] == [True]


def test_sum_of_unknown_shape_is_left_alone() -> None:
    model = make_transformer()
    next(value for node in model.graph for value in node.outputs if value.name == "sum1").shape = None
    report = FuseAddLayerNorm().run(model)
    assert [each.reason for each in report.skipped] == ["the shape of the sum is unknown"]


@pytest.mark.parametrize("new", ["Neg (biased1)", "Add (product1, b1)"], ids=["no sum", "a bias alone"])
def test_norm_of_something_else_is_no_candidate(new: str) -> None:
    report = FuseAddLayerNorm().run(make_transformer(TRANSFORMER.replace("Add (biased1, tokens)", new)))
    assert (report.matched, report.skipped) == (0, ())


def test_half_is_close() -> None:
    model = make_transformer()
    expected = run_model(model, FEEDS[0])
    FuseAddLayerNorm().run(model)
    CastFp16().run(model)
    assert relative_error(model, expected, FEEDS[0]) < 5e-3
