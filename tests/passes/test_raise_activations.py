"""GELU, QuickGELU and the Split in front of a gate, in the spellings of exporters."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from equality import apply_proven, make_model, operators
from small_graphs import normal

from sdc.passes.base import Pass
from sdc.passes.raising.raise_gelu import RaiseGelu
from sdc.passes.raising.raise_quick_gelu import RaiseQuickGelu
from sdc.passes.raising.raise_split import RaiseSplit
from sdc.passes.shapes.resolve_shapes import ResolveShapes
from sdc.passes.simplify.remove_unused import RemoveUnused

HEAD = """<ir_version: 10, opset_import: ["": 23]>
g (float[B, 3, 10] x, float[B, 3, 10] z) => (float[B, 3, 10] y)
<float root = {1.41421356}, float inverse = {0.70710678}, float one = {1}, float half = {0.5}, float two = {2},
 float k = {0.7978845608}, float c = {0.044715}, float three = {3},
 float near_three = {3.7}, float factor = {1.702}, float wrong = {1.6}>
"""
FEEDS = [{"x": 2 * normal(1, batch, 3, 10), "z": normal(2, batch, 3, 10)} for batch in (2, 7)]
ERF = "{ a = Div (x, root)  e = Erf (a)  s = Add (e, one)  p = Mul (x, s)  y = Mul (p, half) }"
TANH = (
    "{ cube = Pow (x, three)  small = Mul (cube, c)  inner = Add (x, small)  a = Mul (inner, k)  t = Tanh (a) "
    "s = Add (t, one)  p = Mul (x, half)  y = Mul (p, s) }"
)
NEARLY_CUBIC = re.sub(r"\bx\b", "m", TANH.replace("three", "near_three")).replace("{", "{ m = Abs (x) ", 1)
QUICK = "{ a = Mul (x, factor)  gate = Sigmoid (a)  y = Mul (x, gate) }"


@pytest.mark.parametrize(
    "body",
    [
        ERF,
        ERF.replace("Div (x, root)", "Mul (x, inverse)"),
        ERF.replace("Add (e, one)", "Add (one, e)").replace("Mul (x, s)", "Mul (s, x)"),
        ERF.replace("p = Mul (x, s)  y = Mul (p, half)", "p = Mul (half, s)  y = Mul (x, p)"),
        ERF.replace("p = Mul (x, s)  y = Mul (p, half)", "p = Mul (x, half)  y = Mul (p, s)"),
        ERF.replace("y = Mul (p, half)", "y = Div (p, two)"),
    ],
)
def test_spellings_by_the_error_function_are_gelu(body: str) -> None:
    model = make_model(HEAD + body, {})
    reports = apply_proven((RaiseGelu(), RemoveUnused()), model, FEEDS)
    assert (reports[0].matched, reports[0].skipped) == (1, ())
    assert operators(model) == ["Gelu"]


@pytest.mark.parametrize(
    "body",
    [
        TANH,
        TANH.replace("cube = Pow (x, three)", "square = Mul (x, x)  cube = Mul (square, x)"),
        TANH.replace("Add (x, small)", "Add (small, x)").replace(
            "p = Mul (x, half)  y = Mul (p, s)", "p = Mul (x, s)  y = Mul (half, p)"
        ),
    ],
)
def test_spellings_by_tanh_are_gelu(body: str) -> None:
    model = make_model(HEAD + body, {})
    apply_proven((RaiseGelu(), RemoveUnused()), model, FEEDS)
    assert operators(model) == ["Gelu"]
    assert next(iter(model.graph)).attributes["approximate"].as_string() == "tanh"


def test_gate_is_no_part_of_gelu() -> None:
    model = make_model(HEAD + ERF.replace("y = Mul (p, half)", "g = Mul (p, half)  y = Mul (z, g)"), {})
    apply_proven((RaiseGelu(), RemoveUnused()), model, FEEDS)
    assert operators(model) == ["Gelu", "Mul"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (ERF.replace("Div (x, root)", "Div (x, wrong)"), "argument"),
        (ERF.replace("Div (x, root)", "Div (z, root)"), "product"),
        (ERF.replace("Add (e, one)", "Add (e, half)"), "product"),
        (ERF.replace("Mul (p, half)", "Mul (p, wrong)"), "product"),
        (
            ERF.replace("Mul (x, s)", "Mul (x, z)").replace("y = Mul (p, half)", "q = Mul (p, half)  y = Add (q, s)"),
            "product",
        ),
        (ERF.replace("y = Mul (p, half)", "q = Mul (p, half)  y = Add (q, e)"), "product"),
        (ERF.replace("y = Mul (p, half)", "q = Mul (p, z)  y = Mul (q, half)"), "product"),
        (TANH.replace("Mul (cube, c)", "Mul (cube, half)"), "argument"),
        (TANH.replace("Pow (x, three)", "Pow (x, two)"), "argument"),
        (NEARLY_CUBIC, "argument"),
        (TANH.replace("Mul (inner, k)", "Mul (inner, half)"), "argument"),
        (TANH.replace("Add (x, small)", "Add (z, small)"), "argument"),
        ("{ y = Tanh (x) }", "argument"),
    ],
)
def test_what_is_not_gelu_stays(body: str, reason: str) -> None:
    model = make_model(HEAD + body, {})
    before = operators(model)
    (report,) = apply_proven(RaiseGelu(), model, FEEDS)
    assert report.matched == 0
    assert reason in report.skipped[0].reason
    assert operators(model) == before


@pytest.mark.parametrize(
    "body",
    [QUICK, QUICK.replace("(x, factor)", "(factor, x)"), QUICK.replace("(x, gate)", "(gate, x)")],
)
def test_spellings_of_quick_gelu_are_one_node(body: str) -> None:
    model = make_model(HEAD + body, {})
    (report,) = apply_proven(RaiseQuickGelu(), model, FEEDS)
    assert report.matched == 1
    assert operators(model) == ["sdc.QuickGelu"]


@pytest.mark.parametrize(
    ("pass_", "body", "wide"),
    [(RaiseQuickGelu(), QUICK, "factor"), (RaiseGelu(), ERF, "half"), (RaiseGelu(), TANH, "half")],
)
def test_number_that_adds_axes_stays(pass_: Pass, body: str, wide: str) -> None:
    value = HEAD[HEAD.index(f"{wide} = {{") :].split("{")[1].split("}")[0]
    head = HEAD.replace("=> (float[B, 3, 10] y)", "=> (float[1, B, 3, 10] y)")
    head = head.replace(f"float {wide} = {{{value}}}", f"float[1, 1, 1, 1] {wide} = {{{value}}}")
    assert apply_proven((ResolveShapes(), pass_), make_model(head + body, {}), FEEDS)[1].matched == 0


def test_quick_gelu_in_half_precision() -> None:
    text = '<ir_version: 10, opset_import: ["": 23]> g (float16[B, 3, 10] x) => (float16[B, 3, 10] y) '
    model = make_model(text + QUICK, {"factor": np.array(1.702, np.float16)})
    # ONNX Runtime may or may not round between the operators of a function.
    feeds = [{"x": each["x"].astype(np.float16)} for each in FEEDS]
    apply_proven(RaiseQuickGelu(), model, feeds, tolerance=2 * 2.0**-11)
    assert operators(model) == ["sdc.QuickGelu"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (QUICK.replace("(x, factor)", "(x, wrong)"), "the factor is 1.6"),
        (QUICK.replace("y = Mul (x, gate)", "q = Mul (x, gate)  y = Add (q, gate)"), "something else reads"),
        (QUICK.replace("y = Mul (x, gate)", "q = Mul (x, gate)  y = Add (q, a)"), "something else reads"),
    ],
)
def test_what_is_not_quick_gelu_stays(body: str, reason: str) -> None:
    model = make_model(HEAD + body, {})
    before = operators(model)
    (report,) = apply_proven(RaiseQuickGelu(), model, FEEDS)
    assert report.matched == 0
    assert reason in report.skipped[0].reason
    assert operators(model) == before


@pytest.mark.parametrize(
    "body", ["{ a = Mul (z, factor)  gate = Sigmoid (a)  y = Mul (x, gate) }", "{ g = Sigmoid (x)  y = Mul (x, g) }"]
)
def test_other_gates_do_not_look_like_quick_gelu(body: str) -> None:
    report = RaiseQuickGelu().run(make_model(HEAD + body, {}))
    assert (report.matched, report.skipped) == (0, ())


def halves(first: str = "0, 5", second: str = "5, 10", axis: int = 2, steps: str = "") -> ir.Model:
    (a, b), (c, d) = first.split(", "), second.split(", ")
    constants = (
        f"int64[1] a = {{{a}}}, int64[1] b = {{{b}}}, int64[1] c = {{{c}}}, int64[1] d = {{{d}}}, "
        f"int64[1] axis = {{{axis}}}"
    )
    text = f"""<ir_version: 10, opset_import: ["": 23]>
        g (float[B, 3, 10] x) => (float[B, 3, 5] y) <{constants}, int64[1] step = {{2}}>
        {{ left = Slice (x, a, b, axis{steps})  right = Slice (x, c, d,
 axis{steps})  g = Tanh (right)  y = Mul (left, g) }}"""
    return make_model(text, {})


@pytest.mark.parametrize(("first", "second", "axis"), [("0, 5", "5, 10", 2), ("-10, -5", "5, 9223372036854775807", -1)])
def test_two_halves_are_a_split(first: str, second: str, axis: int) -> None:
    model = halves(first, second, axis)
    (report,) = apply_proven(RaiseSplit(), model, [{"x": normal(1, batch, 3, 10)} for batch in (2, 7)])
    assert (report.matched, report.skipped) == (1, ())
    assert operators(model) == ["Split", "Tanh", "Mul"]


def test_half_that_is_sliced_twice_leaves_the_graph_in_order() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]>
        g (float[B, 3, 10] x) => (float[B, 3, 5] y)
        <int64[1] zero = {0}, int64[1] five = {5}, int64[1] ten = {10}, int64[1] axis = {2}>
        { left = Slice (x, zero, five, axis)  right = Slice (x, five, ten, axis)  a = Neg (right)
          again = Slice (x, zero, five, axis)  b = Mul (left, a)  y = Add (b, again) }"""
    model = make_model(text, {})
    apply_proven(RaiseSplit(), model, [{"x": normal(1, 2, 3, 10)}])
    assert operators(model) == ["Split", "Neg", "Slice", "Mul", "Add"]


def test_halves_in_the_other_order_keep_their_sides() -> None:
    model = halves("5, 10", "0, 5")
    apply_proven(RaiseSplit(), model, [{"x": normal(1, 2, 3, 10)}])
    assert operators(model) == ["Split", "Tanh", "Mul"]


@pytest.mark.parametrize(
    ("first", "second", "steps", "reported"),
    [("0, 5", "4, 9", "", 1), ("0, 5", "0, 5", "", 1), ("0, 10", "0, 10", ", step", 0), ("1, 6", "3, 8", "", 0)],
)
def test_other_slices_stay(first: str, second: str, steps: str, reported: int) -> None:
    model = halves(first, second, steps=steps)
    before = operators(model)
    (report,) = apply_proven(RaiseSplit(), model, [{"x": normal(1, 2, 3, 10)}])
    assert (report.matched, len(report.skipped)) == (0, reported)
    assert operators(model) == before
