"""Masks that hide what stands behind the diagonal, in the ways of building them, and their near misses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from equality import make_model, run_model

from sdc.passes.raising.causal_pattern import is_causal_mask
from sdc.passes.shapes.resolve_shapes import ResolveShapes

HEAD = """<ir_version: 10, opset_import: ["": 23]>
mask (float[B, S, 3] x) => ({result} mask)
<int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}}, float hidden = {{-3e38}}, float nothing = {{0}},
 float full = {{1}},
 int64[1] first = {{0}}, int64[1] last = {{1}}, int64[2] front = {{0, 1}}, int64[1] two_axes = {{1}},
 int64[2] column = {{-1, 1}}>
"""
SIZES = (
    "length = Shape <start = 1, end = 2> (x)  count = Squeeze (length, first)  index = Range (zero, "
    "count, one)  rows = Reshape (index, column)  "
)
SQUARE = SIZES + "shape = Concat <axis = 0> (length, length)  "


def make(body: str, result: str) -> ir.Model:
    model = make_model(HEAD.format(result=result) + "{" + body + "}", {})
    ResolveShapes().run(model)
    return model


def is_lower_triangle(model: ir.Model, *, allows: bool) -> bool:
    """What the mask holds, by running the model at two sizes."""
    answers = []
    for size in (5, 8):
        (mask,) = run_model(model, {"x": np.zeros((2, size, 3), np.float32)}).values()
        visible = (mask == allows) if mask.dtype == bool else (mask == 0)
        hidden = (mask != allows) if mask.dtype == bool else (mask <= -1e4)
        triangle = np.tri(*mask.shape[-2:], dtype=bool)
        answers.append(bool(np.all(visible == triangle) and np.all(hidden == ~triangle)))
    return all(answers)


CAUSAL = [
    ("mask = LessOrEqual (index, rows)", "bool[S, S]"),
    ("mask = GreaterOrEqual (rows, index)", "bool[S, S]"),
    ("next = Add (rows, one)  mask = Less (index, next)", "bool[S, S]"),
    ("before = Sub (index, one)  mask = Less (before, rows)", "bool[S, S]"),
    ("next = Add (rows, one)  mask = Greater (next, index)", "bool[S, S]"),
    ("behind = Greater (index, rows)  mask = Not (behind)", "bool[S, S]"),
    ("behind = Less (rows, index)  mask = Where (behind, hidden, nothing)", "float[S, S]"),
    ("d = Sub (index, rows)  seen = LessOrEqual (d, zero)  mask = Where (seen, nothing, hidden)", "float[S, S]"),
    (
        (
            "seen = LessOrEqual (index, rows)  number = Cast <to = 1> (seen)  other = Sub (full, "
            "number)  mask = Mul (other, hidden)"
        ),
        "float[S, S]",
    ),
    (
        "seen = LessOrEqual (index, rows)  m = Where (seen, nothing, hidden)  mask = Unsqueeze (m, front)",
        "float[1, 1, S, S]",
    ),
    (
        (
            "ones = Expand (full, shape)  low = Trilu <upper = 0> (ones)  no = Equal (low, nothing)  "
            "mask = Where (no, hidden, nothing)"
        ),
        "float[S, S]",
    ),
    ("fill = Expand (hidden, shape)  mask = Trilu <upper = 1> (fill, one)", "float[S, S]"),
    ("seen = LessOrEqual (index, rows)  always = GreaterOrEqual (two, one)  mask = And (seen, always)", "bool[S, S]"),
    ("seen = LessOrEqual (index, rows)  never = Less (two, one)  mask = Or (never, seen)", "bool[S, S]"),
]
OTHER = [
    ("mask = Less (index, rows)", "bool[S, S]"),
    ("mask = GreaterOrEqual (index, rows)", "bool[S, S]"),
    ("next = Add (rows, two)  mask = Less (index, next)", "bool[S, S]"),
    ("before = Add (index, one)  mask = Less (before, rows)", "bool[S, S]"),
    ("double = Mul (index, two)  mask = LessOrEqual (double, rows)", "bool[S, S]"),
    (
        (
            "ones = Expand (full, shape)  low = Trilu <upper = 0> (ones, one)  no = Equal (low, "
            "nothing)  mask = Where (no, hidden, nothing)"
        ),
        "float[S, S]",
    ),
    ("fill = Expand (hidden, shape)  mask = Trilu <upper = 1> (fill, zero)", "float[S, S]"),
    ("behind = Less (rows, index)  mask = Where (behind, full, nothing)", "float[S, S]"),
    ("behind = Less (rows, index)  mask = Where (behind, hidden, full)", "float[S, S]"),
    ("m = LessOrEqual (index, rows)  mask = Transpose <perm = [1, 0]> (m)", "bool[S, S]"),
]


@pytest.mark.parametrize(("body", "result"), CAUSAL)
def test_causal_masks_are_recognised(body: str, result: str) -> None:
    model = make(SQUARE + body, result)
    assert is_lower_triangle(model, allows=True)
    assert is_causal_mask(model.graph.outputs[0])


@pytest.mark.parametrize(("body", "result"), OTHER)
def test_near_misses_are_not(body: str, result: str) -> None:
    model = make(SQUARE + body, result)
    assert not is_lower_triangle(model, allows=True)
    assert not is_causal_mask(model.graph.outputs[0])


def test_condition_that_hides() -> None:
    model = make(SQUARE + "mask = Greater (index, rows)", "bool[S, S]")
    assert is_lower_triangle(model, allows=False)
    assert is_causal_mask(model.graph.outputs[0], allows=False)
    assert not is_causal_mask(model.graph.outputs[0], allows=True)


def test_rows_and_columns_are_told_apart() -> None:
    model = make(SIZES + "mask = LessOrEqual (rows, index)", "bool[S, S]")
    assert not is_lower_triangle(model, allows=True)
    assert not is_causal_mask(model.graph.outputs[0])


@pytest.mark.parametrize(("start", "causal"), [("first", True), ("last", False)])
def test_slices_have_to_begin_at_the_start(start: str, causal: bool) -> None:
    body = f"m = LessOrEqual (index, rows)  mask = Slice (m, {start}, length, last)"
    model = make(SQUARE + body, "bool[S, T]")
    assert is_lower_triangle(model, allows=True) == causal
    assert is_causal_mask(model.graph.outputs[0]) == causal
