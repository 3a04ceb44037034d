from __future__ import annotations

import onnx.parser
import onnx_ir as ir
import pytest
from equality import apply_proven, make_model, operators
from small_graphs import normal

from sdc.engines.errors import PassError
from sdc.passes.simplify.convert_opset import ConvertOpset

FEEDS = [{"x": normal(1, batch, 6, 5, 7)} for batch in (2, 3)]


def make(opset: int, body: str, result: str = "float[B, 6, 5, 7]", constants: str = "") -> ir.Model:
    ir_version = 8 if opset < 19 else 10
    text = (
        f'<ir_version: {ir_version}, opset_import: ["": {opset}]> g (float[B, 6, 5, 7] x) => ({result} y) {constants}'
    )
    return make_model(text + "{" + body + "}", {})


@pytest.mark.parametrize("operator", ["ReduceMean", "ReduceMax", "ReduceL2", "ReduceSumSquare"])
def test_axes_become_an_operand(operator: str) -> None:
    model = make(14, f"y = {operator} <axes = [-2, 1], keepdims = 0> (x)", "float[B, 7]")
    (report,) = apply_proven(ConvertOpset(), model, FEEDS)
    assert (report.matched, model.graph.opset_imports) == (1, {"": 23})


def test_reduction_of_everything_keeps_its_meaning() -> None:
    apply_proven(ConvertOpset(), make(17, "m = ReduceMean <keepdims = 0> (x)  y = Mul (x, m)"), FEEDS)


def test_split_says_into_how_many() -> None:
    body = "a, b = Split <axis = 1> (x)  y = Sub (a, b)"
    model = make(17, body, "float[B, 3, 5, 7]")
    assert apply_proven(ConvertOpset(), model, FEEDS)[0].matched == 1
    sized = make(
        17,
        body.replace("Split <axis = 1> (x)", "Split <axis = 1> (x, sizes)"),
        "float[B, 3, 5, 7]",
        "<int64[2] sizes = {3, 3}>",
    )
    assert apply_proven(ConvertOpset(), sized, FEEDS)[0].matched == 0


def test_graph_of_the_same_opset_is_not_touched() -> None:
    model = make(23, "y = Relu (x)")
    assert apply_proven(ConvertOpset(), model, FEEDS)[0].matched == 0


@pytest.mark.parametrize(
    ("alpha", "expected"), [("", ["Sigmoid", "Mul"]), ("<alpha = 1.702>", ["Mul", "Sigmoid", "Mul"])]
)
def test_swish_is_spelled_out(alpha: str, expected: list[str]) -> None:
    # ONNX Runtime has no opset 24 on every version that is supported: what it becomes is tested.
    model = make(24, f"y = Swish {alpha} (x)")
    assert ConvertOpset().run(model).matched == 1
    assert operators(model) == expected
    assert model.graph.outputs[0].name == "y"


def test_operators_of_subgraphs_are_converted() -> None:
    body = """
        total = ReduceSum <keepdims = 0> (x)  positive = Greater (total, zero)
        y = If (positive) <then_branch = t () => (float[B, 6, 1, 7] a) { a = ReduceMean <axes = [2]> (x) },
                           else_branch = e () => (float[B, 6, 1, 7] b) { b = ReduceMax <axes = [2]> (x) }>
    """
    model = make(17, body, "float[B, 6, 1, 7]", "<float zero = {0}>")
    (report,) = apply_proven(ConvertOpset(), model, [{"x": sign * abs(FEEDS[0]["x"])} for sign in (1, -1)])
    assert report.matched == 2


@pytest.mark.parametrize("opset", [12, 25])
def test_other_opsets_are_refused(opset: int) -> None:
    with pytest.raises(PassError, match=f"the graph is in opset {opset}, expected 13 to 24"):
        ConvertOpset().run(make(opset, "y = Relu (x)"))


@pytest.mark.parametrize(
    ("opset", "body", "reason"),
    [
        (17, "y = DFT <axis = 1> (x)", "its meaning changed"),
        (18, "y = GroupNormalization <num_groups = 3> (x, x, x)", "computed"),
        (24, "y = Attention (x, x, x, , , , lengths)", "lengths of padded keys"),
    ],
)
def test_what_cannot_be_converted_is_refused(opset: int, body: str, reason: str) -> None:
    text = (
        f'<ir_version: 10, opset_import: ["": {opset}]> g (float[B, 6, 5, 7] x, '
        f"int64[B] lengths) => (float[B, 6, 5, 7] y) {{ {body} }}"
    )
    with pytest.raises(PassError, match=reason):
        ConvertOpset().run(ir.serde.deserialize_model(onnx.parser.parse_model(text)))


def test_operator_that_is_newer_is_refused() -> None:
    text = """<ir_version: 12, opset_import: ["": 24]>
    g (float[2, 6, 4] past, float[2, 1, 4] update, int64[2] at) => (float[2, 6, 4] y)
    { y = TensorScatter <axis = 1> (past, update, at) }"""
    with pytest.raises(PassError, match=r"TensorScatter.*of opset 24 cannot be brought to opset 23: there is no such"):
        ConvertOpset().run(make_model(text, {}))
