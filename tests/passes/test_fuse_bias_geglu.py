from __future__ import annotations

import onnx_ir as ir
import pytest
from equality import apply_proven, operators, relative_error, run_model
from transformer_graph import FEEDS, TRANSFORMER, make_transformer

from sdc.passes.fusion.fuse_bias_geglu import FuseBiasGeGlu
from sdc.passes.precision.cast_fp16 import CastFp16

SPLIT = "value, gate = Split <axis = -1, num_outputs = 2> (biased2)"
SIZES = "int64[3] to_tokens"


def test_gate_becomes_one_node() -> None:
    model = make_transformer()
    (report,) = apply_proven(FuseBiasGeGlu(), model, FEEDS)
    assert (report.matched, report.skipped) == (1, ())
    assert operators(model)[9:12] == ["MatMul", "sdc.BiasGeGlu", "MatMul"]
    (fused,) = (node for node in model.graph if node.domain == "sdc")
    assert [value.name for value in (*fused.inputs, *fused.outputs)] == ["product2", "b2", "gated"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("gated = Mul (value, active)", "gated = Mul (active, value)"),
        ("active = Gelu (gate)", 'active = Gelu <approximate = "tanh"> (gate)'),
        (SPLIT, "value, gate = Split <axis = 2> (biased2, halves)"),
    ],
    ids=["order", "tanh", "sizes"],
)
def test_other_spellings_are_the_same_site(old: str, new: str) -> None:
    text = TRANSFORMER.replace(old, new).replace(SIZES, f"int64[2] halves = {{7, 7}}, {SIZES}")
    assert apply_proven(FuseBiasGeGlu(), make_transformer(text), FEEDS)[0].matched == 1


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Gelu (gate)\n    gated = Mul (value,", "Gelu (value)\n    gated = Mul (gate,", "expected the second"),
        ("gated = Mul (value, active)", "gated = Sub (value, active)", "meet in Sub"),
        ("gated = Mul (value, active)", "g2 = Mul (value, active)  gated = Add (g2, gate)", "something besides"),
        ("gated = Mul (value, active)", "g2 = Mul (value, active)  gated = Add (g2, value)", "something besides"),
        ("gated = Mul (value, active)", "g2 = Mul (value, active)  gated = Add (g2, active)", "something besides"),
        (
            "gated = Mul (value, active)",
            "m = ReduceMean (biased2)  g2 = Mul (value, active)  gated = Add (g2, m)",
            "no MatMul with a bias",
        ),
        ("biased2 = Add (product2, b2)", "b2c = Neg (b2)  biased2 = Add (product2, b2c)", "no MatMul with a bias"),
        ("biased2 = Add (product2, b2)", "p2 = Neg (product2)  biased2 = Add (p2, b2)", "no MatMul with a bias"),
        (SPLIT, "value, gate, more = Split <axis = -1> (biased2, parts)", "expected two equal parts"),
    ],
)
def test_gate_that_cannot_be_fused_says_why(old: str, new: str, reason: str) -> None:
    text = TRANSFORMER.replace(old, new).replace(SIZES, f"int64[3] parts = {{7, 7, 0}}, {SIZES}")
    model = make_transformer(text)
    report = FuseBiasGeGlu().run(model)
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True]


def test_split_along_another_axis_is_no_gate() -> None:
    model = make_transformer()
    split = next(node for node in model.graph if node.op_type == "Split")
    split.attributes["axis"] = ir.AttrInt64("axis", 1)
    assert ["split along axis 1" in each.reason for each in FuseBiasGeGlu().run(model).skipped] == [True]


def test_width_that_is_unknown_is_no_gate() -> None:
    model = make_transformer()
    next(value for node in model.graph for value in node.outputs if value.name == "biased2").shape = None
    assert ["is unknown" in each.reason for each in FuseBiasGeGlu().run(model).skipped] == [True]


def test_gelu_without_a_split_is_no_candidate() -> None:
    text = TRANSFORMER.replace("active = Gelu (gate)", "g = Neg (gate)  active = Gelu (g)")
    report = FuseBiasGeGlu().run(make_transformer(text))
    assert (report.matched, report.skipped) == (0, ())


def test_half_is_close() -> None:
    model = make_transformer()
    expected = run_model(model, FEEDS[0])
    FuseBiasGeGlu().run(model)
    CastFp16().run(model)
    assert relative_error(model, expected, FEEDS[0]) < 5e-3
