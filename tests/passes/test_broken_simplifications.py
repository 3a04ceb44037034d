"""Passes that respell a graph and follow its sizes, broken in the ways in which they could have been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from broken import (
    Broken,
    Case,
    attribute,
    check_noticed,
    entry,
    initializers,
    names,
    nodes,
    operand_values,
    patched,
    swapped,
)
from equality import make_model
from onnxscript.rewriter import RewriteRule
from small_graphs import normal
from test_factorise_weights import FEEDS as LAYERS_FEEDS
from test_factorise_weights import TOLERANCE as LAYERS_TOLERANCE
from test_factorise_weights import make as make_layers
from test_merge_shapes import FEEDS as SHAPES_FEEDS
from test_merge_shapes import TEXT as SHAPES
from test_raise_norms import LAYER_FEEDS, LAYER_NORM, layer_norm
from test_resolve_shapes import FEEDS as SIZES_FEEDS
from test_resolve_shapes import ONES, SIZES, make

from sdc.passes.shapes.infer_shapes import InferShapes
from sdc.passes.shapes.merge_shapes import MergeShapes
from sdc.passes.shapes.resolve_shapes import ResolveShapes
from sdc.passes.simplify.cancel_no_ops import CancelNoOps
from sdc.passes.simplify.convert_opset import ConvertOpset
from sdc.passes.simplify.drop_neutral import DropNeutral
from sdc.passes.simplify.factorise_weights import FactoriseWeights
from sdc.passes.simplify.fold_constants import FoldConstants
from sdc.passes.simplify.inline_functions import InlineFunctions
from sdc.passes.simplify.lift_constants import LiftConstants
from sdc.passes.simplify.merge_duplicates import MergeDuplicates
from sdc.passes.simplify.order_operands import OrderOperands
from sdc.passes.simplify.remove_unused import RemoveUnused

SQUARE = '<ir_version: 10, opset_import: ["": 23]> g (float[B, 5, 5] x) => (float[B, 5, 5] y) '
CONSTANTS = "<float two = {2}, float one = {1}, float same = {2}, float other = {2.5}> "
FEEDS = [{"x": normal(1, batch, 5, 5)} for batch in (2, 7)]
OLD_NORM = (
    LAYER_NORM.replace('"": 23', '"": 14')
    .replace("ir_version: 10", "ir_version: 8")
    .replace("int64[1] last = {-1}, ", "")
    .replace("ReduceMean (x, last)", "ReduceMean <axes = [-1]> (x)")
    .replace("ReduceMean (squared, last)", "ReduceMean <axes = [2]> (squared)")
)
OLD_SPLIT = """<ir_version: 8, opset_import: ["": 14]> g (float[B, 5, 6] x) => (float[B, 5, 3] y)
    { a, b = Split <axis = 2> (x)  g = Tanh (b)  y = Mul (a, g) }"""
CALLS = """<ir_version: 10, opset_import: ["": 23, "other": 1]> g (float[B, 5, 5] x) => (float[B, 5, 5] y)
    { s = Sigmoid (x)  y = other.less <by = 0.3> (x, s) }
    <domain: "other", opset_import: ["": 23]> less <by> (a, b) => (c)
    { f = Constant <value_float: float = @by> ()  scaled = Mul (b, f)  c = Sub (a, scaled) }"""
TARGET = "hw = Mul (h, w_)  hw1 = Unsqueeze (hw, first)  t = Concat <axis = 0> (b1, c1, hw1)  y = Reshape (x, t)"
PLANES = (
    "flat = Concat <axis = 0> (b1, c1, minus)  f = Reshape (x, flat)  n = Neg (f)  "
    "t = Concat <axis = 0> (b1, c1, h1, w_1)  y = Reshape (n, t)"
)


def square(body: str) -> Callable[[], ir.Model]:
    return lambda: make_model(SQUARE + CONSTANTS + "{" + body + "}", {})


def sized(body: str, result: str) -> Callable[[], ir.Model]:
    return lambda: make(SIZES + ONES + body, result)


def merge_regardless_of_attributes(model: ir.Model) -> None:
    """What a merge does that looks at operators and operands alone."""
    first: dict[Any, ir.Node] = {}
    for node in list(model.graph):
        kept = first.setdefault((node.op_type, *node.inputs), node)
        if kept is not node:
            node.outputs[0].replace_all_uses_with(kept.outputs[0])
            model.graph.remove(node, safe=True)


def swap_outputs(node: ir.Node) -> None:
    """The readers of one half read the other."""
    first, second = (list(value.uses()) for value in node.outputs)
    for uses, value in ((first, node.outputs[1]), (second, node.outputs[0])):
        for reader, index in uses:
            reader.replace_input_with(index, value)


def lose_axes(node: ir.Node) -> bool:
    """The axes of a reduction do not become an operand."""
    return node.attributes.pop("axes") is not None


def any_transpose() -> RewriteRule:
    """A Transpose in any order is taken for none."""
    return RewriteRule(
        lambda op, x: op.Transpose(x, _allow_other_attributes=True), lambda op, x, **_: op.Identity(x), name="transpose"
    )


def any_cast() -> RewriteRule:
    """A Cast there and back is taken for none, whatever it rounds to."""
    return RewriteRule(
        lambda op, x: op.Cast(op.Cast(x, _allow_other_attributes=True), _allow_other_attributes=True),
        lambda op, x, **_: op.Identity(x),
        name="cast",
    )


def one_axis_later(model: ir.Model) -> None:
    """A size is read one axis too far to the front."""
    for node in model.graph:
        if node.op_type == "Shape" and "start" in node.attributes:
            for name in ("start", "end"):
                node.attributes[name] = ir.AttrInt64(name, node.attributes[name].as_int() - 1)


def stride_twice(model: ir.Model) -> None:
    """Both convolutions of a split one have its attributes."""
    first, second = [node for node in model.graph if node.op_type == "Conv"]
    second.attributes["strides"] = first.attributes["strides"]


def scale_twice(model: ir.Model) -> None:
    """Both Gemms of a split one are scaled."""
    first, second, *_ = [node for node in model.graph if node.op_type == "Gemm"]
    first.attributes["alpha"] = second.attributes["alpha"]


def bias_first(model: ir.Model) -> None:
    """The first half of a split convolution has the bias, as far as it goes."""
    first, second = [node for node in model.graph if node.op_type == "Conv"]
    rank, bias = first.inputs[1].shape[0], second.inputs[2]
    bias.const_value = ir.tensor(bias.const_value.numpy()[:rank], name=bias.name)
    bias.shape = ir.Shape([rank])
    first.resize_inputs(3)
    first.replace_input_with(2, bias)
    second.resize_inputs(2)


def one_rank_less(factors: Callable[..., Any]) -> Callable[..., Any]:
    """Factors without the least direction."""

    def fewer(matrix: np.ndarray, tolerance: float) -> Any:
        found = factors(matrix, tolerance)
        return None if found is None else (found[0][:, 1:], found[1][1:])

    return fewer


CASES = {
    "factorise-weights": Case(
        make_layers,
        LAYERS_FEEDS,
        (FactoriseWeights(), RemoveUnused()),
        {
            "a rank too low": patched("simplify.factorise_weights:low_rank_factors", one_rank_less),
            "coarse tolerance": patched(
                "simplify.factorise_weights:low_rank_factors", lambda factors: lambda matrix, _: factors(matrix, 0.5)
            ),
            "strides twice": Broken(change=stride_twice),
            "alpha twice": Broken(change=scale_twice),
            "bias before the second": Broken(change=bias_first),
            "bias forgotten": nodes("Conv", lambda node: node.resize_inputs(2)),
        },
        tolerance=LAYERS_TOLERANCE,
    ),
    "convert-opset, Reduce": Case(
        lambda: layer_norm(OLD_NORM),
        LAYER_FEEDS,
        (ConvertOpset(),),
        {
            "axes lost": entry("simplify.convert_opset:_CHANGED", "ReduceMean", (18, lose_axes)),
            "another axis": operand_values("ReduceMean", 1, lambda axes: 0 * axes + 1),
        },
    ),
    "convert-opset, Split": Case(
        lambda: make_model(OLD_SPLIT, {}),
        [{"x": normal(1, batch, 5, 6)} for batch in (2, 7)],
        (ConvertOpset(),),
        {"parts swapped": nodes("Split", swap_outputs)},
    ),
    "inline-functions": Case(
        lambda: make_model(CALLS, {}),
        FEEDS,
        (InlineFunctions(), InferShapes()),
        {
            "operands swapped": swapped("Sub", 0, 1),
            "attribute lost": attribute("Constant", "value_float", 1.0),
        },
    ),
    "lift-constants": Case(
        square("c = Constant <value_float = 1.1> ()  y = Mul (x, c)"),
        FEEDS,
        (LiftConstants(),),
        {"in half": initializers(lambda value: value.name == "c", lambda c: c.astype(np.float16))},
    ),
    "fold-constants": Case(
        square("a = Mul (two, other)  b = Sqrt (a)  y = Mul (x, b)"),
        FEEDS,
        (FoldConstants(), LiftConstants(), RemoveUnused()),
        {"in half": initializers(lambda value: value.name == "b", lambda b: b.astype(np.float16))},
    ),
    "cancel-no-ops, Transpose": Case(
        square("a = Transpose <perm = [0, 1, 2]> (x)  b = Transpose <perm = [0, 2, 1]> (a)  y = Sub (b, one)"),
        FEEDS,
        (CancelNoOps(),),
        {"another order dropped": entry("simplify.cancel_no_ops:_RULES", "transpose", any_transpose())},
    ),
    "cancel-no-ops, Transposes": Case(
        square("a = Transpose <perm = [1, 2, 0]> (x)  b = Transpose <perm = [2, 1, 0]> (a)  y = Sub (b, one)"),
        [{"x": normal(1, 5, 5, 5)}],
        (CancelNoOps(),),
        {"orders composed the other way": attribute("Transpose", "perm", [1, 0, 2])},
    ),
    "cancel-no-ops, Cast": Case(
        square("a = Cast <to = 1> (x)  h = Cast <to = 10> (a)  f = Cast <to = 1> (h)  y = Sub (f, one)"),
        FEEDS,
        (CancelNoOps(),),
        {"rounding dropped": entry("simplify.cancel_no_ops:_RULES", "cast_cast", any_cast())},
    ),
    "drop-neutral": Case(
        square("a = Mul (x, one)  b = Mul (a, two)  c = Sub (one, b)  y = Neg (c)"),
        FEEDS,
        (DropNeutral(),),
        {"another number taken for neutral": entry("simplify.drop_neutral:_NEUTRAL", "Mul", 2.0)},
    ),
    "drop-neutral, sides": Case(
        lambda: make_model(SQUARE + "<float zero = {0}> { a = Add (x, zero)  c = Sub (zero, a)  y = Exp (c) }", {}),
        FEEDS,
        (DropNeutral(),),
        {"Sub from zero dropped": entry("simplify.drop_neutral:_SIDES", "Sub", (0, 1))},
    ),
    "order-operands": Case(
        square("a = Mul (two, x)  b = Sub (one, a)  c = Sigmoid (b)  y = Div (two, c)"),
        FEEDS,
        (OrderOperands(),),
        {
            f"{op_type} turned": patched(
                "simplify.order_operands:is_operator",
                lambda is_operator, wrong=op_type: (
                    lambda node, wanted: is_operator(node, wanted) or is_operator(node, wrong)
                ),
            )
            for op_type in ("Sub", "Div")
        },
    ),
    "merge-duplicates": Case(
        square(
            "a = Mul (x, two)  b = Mul (x, same)  c = Add (a, b)  d = Mul (x, other)  "
            "p = Softmax <axis = 1> (c)  q = Softmax <axis = 2> (c)  r = Sub (p, q)  y = Sub (r, d)"
        ),
        FEEDS,
        (MergeDuplicates(),),
        {
            "other attributes merged": Broken(change=merge_regardless_of_attributes),
            "other bytes merged": initializers(lambda value: value.name == "other", lambda _: np.array(2.0)),
        },
    ),
    "merge-shapes": Case(
        lambda: make_model(
            SHAPES.replace("float[B, 3, H, W] y", "float[B, 3, W, H] y").replace(
                "other = Shape (z)", "other = Shape (x)"
            ),
            {},
        ),
        [each | {"y": each["y"].swapaxes(2, 3)} for each in SHAPES_FEEDS],
        (MergeShapes(),),
        {
            "order not looked at": patched(
                "shapes.merge_shapes:_sizes", lambda sizes: lambda node: tuple(sorted(map(str, sizes(node) or ())))
            ),
        },
    ),
    "resolve-shapes": Case(
        sized(TARGET, "float[B, 6, N]"),
        SIZES_FEEDS,
        (ResolveShapes(), RemoveUnused()),
        {
            "sizes in another order": operand_values("Reshape", 1, lambda to: to[[0, 2, 1]]),
            "another size": operand_values("Reshape", 1, lambda to: to * [1, 2, 1]),
        },
    ),
    "resolve-shapes, free sizes": Case(
        sized(PLANES, "float[B, 6, H, W]"),
        SIZES_FEEDS,
        (ResolveShapes(), RemoveUnused()),
        {"read from other axes": Broken(change=one_axis_later)},
    ),
}


@pytest.mark.parametrize(("name", "kind"), names(CASES))
def test_broken_pass_is_noticed(name: str, kind: str) -> None:
    check_noticed(CASES[name], kind)
