from __future__ import annotations

import pytest
from equality import apply_proven, make_model, operators
from small_graphs import normal

from sdc.passes.shapes.merge_shapes import MergeShapes

TEXT = """
<ir_version: 10, opset_import: ["": 23]>
shapes (float[B, 3, H, W] x, float[B, 3, H, W] y, float[B, 3, N] z) => (int64[M] s)
{
    first = Shape (x)
    second = Shape (y)
    plane = Shape <start = 2> (x)
    same_plane = Shape <start = -2, end = 9> (y)
    other = Shape (z)
    s = Concat <axis = 0> (first, second, plane, same_plane, other)
}
"""
FEEDS = [{"x": normal(1, 2, 3, 5, 7), "y": normal(2, 2, 3, 5, 7), "z": normal(3, 2, 3, 11)}]


def test_equal_sizes_are_asked_for_once() -> None:
    model = make_model(TEXT, {})
    assert apply_proven(MergeShapes(), model, FEEDS)[0].matched == 2
    assert operators(model) == ["Shape", "Shape", "Shape", "Concat"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float[B, 3, H, W] y", "float[B, 3, W, H] y"),
        ("float[B, 3, H, W] y", "float[B, 3, H, ] y"),
        ("second = Shape (y)", "second = Shape <end = 3> (y)"),
    ],
    ids=["order", "unknown size", "range"],
)
def test_sizes_that_are_not_known_to_be_equal_are_kept_apart(old: str, new: str) -> None:
    text = TEXT.replace(old, new).replace("H, ] y", "H, ?] y")
    model = make_model(text, {})
    before = operators(model).count("Shape")
    MergeShapes().run(model)
    kept = [node.inputs[0].name for node in model.graph if node.op_type == "Shape"]  # type: ignore[union-attr]
    assert "y" in kept
    assert operators(model).count("Shape") >= before - 1


def test_shape_that_is_an_output_stays() -> None:
    model = make_model(TEXT.replace("(int64[M] s)", "(int64[M] s, int64[4] second)"), {})
    assert apply_proven(MergeShapes(), model, FEEDS)[0].matched == 1
