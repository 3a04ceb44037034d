from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from equality import apply_proven, make_model, operators
from small_graphs import normal

from sdc.passes.shapes.infer_shapes import InferShapes
from sdc.passes.simplify.cancel_no_ops import CancelNoOps
from sdc.passes.simplify.fix_names import FixNames
from sdc.passes.simplify.fold_constants import FoldConstants
from sdc.passes.simplify.inline_functions import InlineFunctions
from sdc.passes.simplify.lift_constants import LiftConstants
from sdc.passes.simplify.merge_duplicates import MergeDuplicates
from sdc.passes.simplify.remove_unused import RemoveUnused

HEAD = '<ir_version: 10, opset_import: ["": 23]> g (float[B, 3, 5] x) => (float[P, Q, R] y)\n'
FEEDS = [{"x": normal(1, batch, 3, 5)} for batch in (2, 7)]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("c = Cast <to = 1> (x)  y = Neg (c)", ["Neg"]),
        ("a = Transpose <perm = [0, 1, 2]> (x)  y = Neg (a)", ["Neg"]),
        ("a = Transpose <perm = [2, 0, 1]> (x)  b = Transpose <perm = [1, 2, 0]> (a)  y = Neg (b)", ["Neg"]),
        (
            "a = Transpose <perm = [2, 0, 1]> (x)  b = Transpose <perm = [2, 0, 1]> (a)  y = Neg (b)",
            ["Transpose", "Neg"],
        ),
        ("i = Identity (x)  j = Identity (i)  y = Neg (j)", ["Neg"]),
        ("f = Reshape (x, flat)  r = Reshape (f, cube)  y = Neg (r)", ["Reshape", "Neg"]),
    ],
)
def test_movement_that_cancels_goes(body: str, left: list[str]) -> None:
    model = make_model(f"{HEAD} <int64[1] flat = {{-1}}, int64[3] cube = {{-1, 5, 3}}> {{ {body} }}", {})
    apply_proven((CancelNoOps(), RemoveUnused()), model, FEEDS)
    assert operators(model) == left


def test_cast_that_rounds_stays() -> None:
    model = make_model(HEAD + "{ h = Cast <to = 10> (x)  f = Cast <to = 1> (h)  y = Neg (f) }", {})
    apply_proven(CancelNoOps(), model, FEEDS)
    assert operators(model) == ["Cast", "Cast", "Neg"]


def test_data_that_is_read_on_the_way_stays() -> None:
    body = "{ a = Transpose <perm = [2, 0, 1]> (x)  b = Transpose <perm = [1, 2, 0]> (a)"
    body += "  s = ReduceSum (a)  y = Add (b, s) }"
    model = make_model(HEAD + body, {})
    apply_proven((CancelNoOps(), RemoveUnused()), model, FEEDS)
    assert operators(model) == ["Transpose", "Transpose", "ReduceSum", "Add"]


def test_constants_are_lifted_and_folded() -> None:
    body = "{ two = Constant <value_float = 2.0> ()  four = Mul (two, two)  y = Mul (x, four) }"
    model = make_model(HEAD + body, {})
    reports = apply_proven((LiftConstants(), FoldConstants(), LiftConstants(), RemoveUnused()), model, FEEDS)
    assert [report.matched for report in reports[:2]] == [1, 1]
    assert operators(model) == ["Mul"]


@pytest.mark.parametrize(("limits", "folded"), [((15, 15), True), ((14, 15), False), ((15, 14), False)])
def test_folding_stops_at_the_size_limits(limits: tuple[int, int], folded: bool) -> None:
    # The weight stays for its other reader: folding would hold 15 elements more.
    model = make_model(HEAD + "{ n = Neg (w)  s = Add (x, n)  y = Mul (s, w) }", {"w": normal(2, 3, 5)})
    apply_proven((FoldConstants(*limits), LiftConstants()), model, FEEDS)
    assert operators(model) == (["Add", "Mul"] if folded else ["Neg", "Add", "Mul"])


def test_equal_scalars_and_equal_nodes_exist_once() -> None:
    head = HEAD + "<float a = {1.5}, float b = {1.5}, float c = {2.5}>"
    model = make_model(head + "{ p = Mul (x, a)  q = Mul (x, b)  r = Mul (x, c)  s = Add (p, q)  y = Add (s, r) }", {})
    (report,) = apply_proven(MergeDuplicates(), model, FEEDS)
    assert report.details == {"initializers": 1, "nodes": 1}
    assert operators(model) == ["Mul", "Mul", "Add", "Add"]


def test_large_equal_weights_are_not_compared() -> None:
    weights = {"v": np.ones((3, 5), np.float32), "w": np.ones((3, 5), np.float32)}
    model = make_model(HEAD + "{ p = Mul (x, v)  y = Mul (p, w) }", weights)
    assert MergeDuplicates(size_limit=14).run(model).matched == 0
    assert MergeDuplicates(size_limit=15).run(model).matched == 1


def test_dead_code_goes_and_the_interface_stays() -> None:
    text = HEAD.replace("x)", "x, float[3] never_read)") + "<float a = {1.5}> { dead = Mul (x, a)  y = Neg (x) }"
    model = make_model(text, {})
    (report,) = apply_proven(RemoveUnused(), model, [each | {"never_read": normal(3, 3)} for each in FEEDS])
    assert report.details == {"nodes": 1, "initializers": 1, "functions": 0}
    assert [value.name for value in model.graph.inputs] == ["x", "never_read"]


def test_names_are_made_unique() -> None:
    model = make_model(HEAD + "{ n = Neg (x)  y = Neg (n) }", {})
    for node in model.graph:
        node.name = "same"
    assert FixNames().run(model).matched == 1
    assert len({node.name for node in model.graph}) == 2


def test_foreign_functions_are_inlined() -> None:
    text = """<ir_version: 10, opset_import: ["": 23, "other": 1]> g (float[B, 3, 5] x) => (float[B, 3, 5] y)
        { t = other.twice (x)  y = other.twice (t) }
        <domain: "other", opset_import: ["": 23]> twice (v) => (w) { w = Add (v, v) }"""
    model = make_model(text, {})
    (report,) = apply_proven(InlineFunctions(), model, FEEDS)
    assert report.matched == 2
    assert operators(model) == ["Add", "Add"]


def test_stated_shapes_are_kept_and_gaps_filled() -> None:
    model = make_model(HEAD + "{ n = Neg (x)  y = Abs (n) }", {})
    negated, absolute = (node.outputs[0] for node in model.graph)
    negated.shape, negated.type = None, None
    stated = absolute.shape = ir.Shape(["B", 3, "five"])
    report = InferShapes().run(model)
    assert (report.matched, report.skipped) == (1, ())
    assert (str(negated.shape), negated.dtype) == ("[B,3,5]", ir.DataType.FLOAT)
    assert absolute.shape == stated
    assert InferShapes().run(model).matched == 0
