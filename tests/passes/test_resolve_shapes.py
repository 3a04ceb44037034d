"""Shape arithmetic of exporters: what becomes a constant, what becomes a short target, what stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from equality import apply_proven, make_model, operators
from small_graphs import normal

from sdc.passes.shapes.resolve_shapes import ResolveShapes
from sdc.passes.shapes.sizes import broadcast_size, clamped, normal_size
from sdc.passes.simplify.drop_neutral import DropNeutral
from sdc.passes.simplify.order_operands import OrderOperands
from sdc.passes.simplify.remove_unused import RemoveUnused

CONSTANTS = """<int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64 three = {3}, int64[1] first = {0},
 int64[1] minus = {-1},
 int64[3] rest = {1, 2, 3}, int64[1] three_1d = {3}, int64[1] one_1d = {1}, int64[1] end = {9223372036854775807},
 float[4] doubled = {1, 1, 2, 2}>"""
PASSES = (ResolveShapes(), RemoveUnused())
FEEDS = [{"x": normal(1, batch, 6, *size)} for batch, size in ((2, (4, 6)), (3, (8, 2)))]


def make(body: str, result: str) -> ir.Model:
    head = f'<ir_version: 10, opset_import: ["": 23]> g (float[B, 6, H, W] x) => ({result} y) {CONSTANTS} '
    model = make_model(head + "{" + body + "}", {"w": normal(5, 6, 6, 3, 3)} if "w)" in body else {})
    for node in model.graph:  # as the TorchScript exporter leaves it
        for value in node.outputs:
            value.shape = None if not value.is_graph_output() else value.shape
    return model


def targets(model: ir.Model) -> list[list[int] | None]:
    """Constant targets of the Reshapes, None for computed ones."""
    found = []
    for node in model.graph:
        if node.op_type == "Reshape":
            tensor = node.inputs[1].const_value if node.inputs[1] is not None else None
            found.append(None if tensor is None else tensor.numpy().tolist())
    return found


SIZES = "s = Shape (x)  b = Gather (s, zero)  c = Gather (s, one)  h = Gather (s, two)  w_ = Gather (s, three) "
ONES = "".join(f"{name}1 = Unsqueeze ({name}, first)  " for name in ("b", "c", "h", "w_"))


def test_target_is_copies_numbers_and_one_rest() -> None:
    body = (
        SIZES
        + ONES
        + "hw = Mul (h, w_)  hw1 = Unsqueeze (hw, first)  t = Concat <axis = 0> (b1, c1, hw1)  y = Reshape (x, t)"
    )
    model = make(body, "float[B, 6, N]")
    apply_proven(PASSES, model, FEEDS)
    assert operators(model) == ["Reshape"]
    assert targets(model) == [[0, 6, -1]]


def test_division_of_a_known_size_is_a_number() -> None:
    body = (
        SIZES
        + ONES
        + "half = Div (c, two)  h2 = Unsqueeze (half, first)  t = Concat <axis = 0> (b1, minus, h2)  y = Reshape (x, t)"
    )
    model = make(body, "float[B, N, 3]")
    apply_proven(PASSES, model, FEEDS)
    assert targets(model) == [[0, -1, 3]]


def test_several_free_sizes_are_read_where_they_stand_together() -> None:
    body = (
        SIZES
        + ONES
        + (
            "flat = Concat <axis = 0> (b1, c1, minus)  f = Reshape (x, flat)  n = Neg (f)  "
            "t = Concat <axis = 0> (b1, c1, h1, w_1)  y = Reshape (n, t)"
        )
    )
    model = make(body, "float[B, 6, H, W]")
    apply_proven(PASSES, model, FEEDS)
    assert operators(model) == ["Reshape", "Neg", "Shape", "Concat", "Reshape"]


def test_sizes_behind_strided_convolution_and_resize_are_followed() -> None:
    body = (
        'c = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w)  u = Resize <mode = "nearest"> (c, , doubled)  '
        "s = Shape (u)  a = Slice (s, first, one_1d)  t = Concat <axis = 0> (a, three_1d, minus)  y = Reshape (u, t)"
    )
    model = make(body, "float[B, 3, N]")
    apply_proven(PASSES, model, [{"x": normal(1, 2, 6, *size)} for size in ((4, 6), (5, 7))])
    assert targets(model) == [[0, 3, -1]]
    shape = next(node for node in model.graph if node.op_type == "Resize").outputs[0].shape
    assert shape is not None
    assert shape[2] == "2*floor(H/2 - 1/2) + 2"


def test_expansion_to_ones_or_more_is_followed() -> None:
    # torch's expand(-1, ...) as the TorchScript exporter writes it
    body = (
        SIZES
        + ONES
        + "t = Concat <axis = 0> (b1, minus)  n = Shape (t)  ones = ConstantOfShape <value = int64[1] {1}> (n)  "
        + "m = Mul (ones, minus)  q = Equal (t, m)  target = Where (q, ones, t)  "
        + "r = ReduceMean <keepdims = 0> (x)  e = Expand (r, target)  "
        + "k = ReduceMean <keepdims = 0> (x, rest)  k1 = Unsqueeze (k, one_1d)  y = Add (e, k1)"
    )
    model = make(body, "float[B, 1]")
    apply_proven(PASSES, model, FEEDS)
    assert "Expand" in operators(model)
    assert "Where" not in operators(model)


def test_stated_symbols_of_no_input_are_replaced_and_others_kept() -> None:
    model = make("a = Neg (x)  b = Neg (a)  y = Neg (b)", "float[B, 6, Neg_dim_1, Neg_dim_1]")
    (a, b, _) = (node.outputs[0] for node in model.graph)
    a.shape, b.shape = ir.Shape(["B", 6, "H", "2*W/2"]), ir.Shape(["bad", 6, "bad", None])
    apply_proven(PASSES, model, FEEDS)
    assert [list(value.shape or ()) for value in (a, b, model.graph.outputs[0])] == [["B", 6, "H", "W"]] * 3


def test_unknown_sizes_get_symbols_of_their_own() -> None:
    model = make("n = NonZero (x)  f = Cast <to = 1> (n)  y = Neg (f)", "float[4, N]")
    ResolveShapes().run(model)
    assert [value.shape[1] for node in model.graph for value in node.outputs if value.shape is not None] == [
        "size_0"
    ] * 3


def test_target_that_cannot_be_read_stays() -> None:
    body = (
        SIZES
        + ONES
        + "hc = Mul (h, c)  hc1 = Unsqueeze (hc, first)  wb = Mul (w_, b)  wb1 = Unsqueeze (wb, first)  "
        + ("t = Concat <axis = 0> (hc1, wb1)  y = Reshape (x, t)")
    )
    model = make(body, "float[M, N]")
    apply_proven(PASSES, model, FEEDS)
    assert operators(model).count("Mul") == 2
    assert targets(model) == [None]


def test_empty_tensors_are_left_alone() -> None:
    head = (
        '<ir_version: 10, opset_import: ["": 23]> g (float[B, 0, 3] x) => (float[B, 3, 0] y) <int64[3] t = {-1, 3, 0}> '
    )
    model = make_model(
        head + "{ y = Reshape <allowzero = 1> (x, u) }".replace("u", "s").replace("{ y", "{ s = Identity (t)  y"), {}
    )
    ResolveShapes().run(model)
    assert next(node for node in model.graph if node.op_type == "Reshape").attributes["allowzero"].as_int() == 1


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(1, "S", "S"), ("S", 1, "S"), ("S", "S", "S"), ("S", 4, 4), ("S", "T", None), (None, 1, None), (None, 4, 4)],
)
def test_sizes_meet(a: int | str | None, b: int | str | None, expected: int | str | None) -> None:
    sizes = [normal_size(ir.SymbolicDim(size)) if isinstance(size, str) else size for size in (a, b)]
    assert broadcast_size(*sizes) == expected
    assert broadcast_size(*reversed(sizes)) == expected


def test_size_meets_itself_clamped() -> None:
    size = ir.SymbolicDim("S")
    assert broadcast_size(size, clamped(size, 77)) == "S"
    assert broadcast_size(clamped(size, 77), size) == "S"
    assert broadcast_size(ir.SymbolicDim("T"), clamped(size, 77)) is None
    assert clamped(size, 1) == 1


NEUTRAL = (
    '<ir_version: 10, opset_import: ["": 23]> g (float[B, 3, 5] x) => (float[B, 3, '
    "5] y) <float zero = {0}, float one = {1}, float[3, 1] ones = {1, 1, 1}, float[2, 1, 1, "
    "1] four = {1, 1, 1, 1}, float two = {2}, float empty = {0}, int64[1] first = {0}, "
    "int64[1] third = {3}, int64[1] axis = {1}, int64[1] back = {-1}, int64[1] begin = {-9}, "
    "int64[3] same = {0, 3, 5}, int64[3] other = {0, 5, 3}>"
)
X = [{"x": normal(1, batch, 3, 5)} for batch in (2, 7)]


@pytest.mark.parametrize(
    "body",
    [
        "z = Add (x, zero)",
        "z = Add (zero, x)",
        "z = Sub (x, zero)",
        "z = Mul (one, x)",
        "z = Mul (x, ones)",
        "z = Div (x, one)",
        "s = Shape (x)  e = ConstantOfShape (s)  n = Mul (e, two)  z = Add (x, n)",
        "s = Shape (x)  e = Expand (zero, s)  z = Add (e, x)",
        "z = Reshape (x, same)",
        "s = Shape (x)  z = Expand (x, s)",
        "z = Slice (x, first, third, axis)",
    ],
)
def test_neutral_operators_go(body: str) -> None:
    model = make_model(NEUTRAL + "{" + body + "  y = Neg (z) }", {})
    apply_proven((ResolveShapes(), DropNeutral(), RemoveUnused()), model, X)
    assert operators(model) == ["Neg"]


@pytest.mark.parametrize(
    "body",
    [
        "z = Sub (zero, x)",
        "z = Div (one, x)",
        "z = Mul (x, two)",
        "z = Add (x, one)",
        "z = Mul (x, zero)",
        "n = Mul (x, zero)  z = Add (x, n)",
        "z = Slice (x, back, begin, axis, back)",
    ],
)
def test_other_operators_stay(body: str) -> None:
    model = make_model(NEUTRAL + "{" + body + "  y = Neg (z) }", {})
    before = operators(model)
    feeds = X if "Mul (x, zero)" not in body or "Add" in body else []
    apply_proven((ResolveShapes(), DropNeutral(), RemoveUnused()), model, feeds)
    assert operators(model) == before


def test_neutral_element_that_repeats_its_partner_stays() -> None:
    head = '<ir_version: 10, opset_import: ["": 23]> g (float[1, 3] x) => (float[2, 3] y) <float[2, 1] ones = {1, 1}> '
    model = make_model(head + "{ z = Mul (x, ones)  y = Neg (z) }", {})
    apply_proven((ResolveShapes(), DropNeutral()), model, [{"x": normal(1, 1, 3)}])
    assert operators(model) == ["Mul", "Neg"]


def test_output_of_the_graph_keeps_its_operator() -> None:
    model = make_model(NEUTRAL + "{ y = Add (x, zero) }", {})
    apply_proven((ResolveShapes(), DropNeutral()), model, X)
    assert operators(model) == ["Add"]


@pytest.mark.parametrize("operator", ["Add", "Mul"])
def test_initialiser_comes_second(operator: str) -> None:
    model = make_model(NEUTRAL + f"{{ z = {operator} (two, x)  y = Sub (two, z) }}", {})
    (report,) = apply_proven(OrderOperands(), model, X)
    assert report.matched == 1
    first, second = model.graph
    assert [value.name for value in (*first.inputs, *second.inputs) if value is not None] == ["x", "two", "two", "z"]


def test_contents_of_large_tensors_are_not_followed() -> None:
    text = (
        '<ir_version: 10, opset_import: ["": 23]> g (float[B, 3] x) => (int64[99] y) { z = Neg (big)  '
        "y = Add (z, big) }"
    )
    model = make_model(text, {"big": np.arange(99, dtype=np.int64)})
    assert ResolveShapes().run(model).matched == 0
