from __future__ import annotations

import pytest
from equality import apply_proven, make_model, operators
from small_graphs import normal

from sdc.passes.raising.raise_silu import RaiseSilu

HEAD = '<ir_version: 10, opset_import: ["": 23]> g (float[B, 3, 5] x, float[B, 3, 5] z) => (float[B, 3, 5] y) '
FEEDS = [{"x": normal(1, batch, 3, 5), "z": normal(2, batch, 3, 5)} for batch in (2, 7)]


@pytest.mark.parametrize("factors", ["x, gate", "gate, x"])
def test_either_order_of_factors_is_silu(factors: str) -> None:
    model = make_model(HEAD + f"{{ gate = Sigmoid (x)  silu = Mul ({factors})  y = Add (silu, z) }}", {})
    (report,) = apply_proven(RaiseSilu(), model, FEEDS)
    assert report.matched == 1
    assert operators(model) == ["sdc.Silu", "Add"]


def test_silu_that_is_the_output_keeps_its_name() -> None:
    model = make_model(HEAD + "{ gate = Sigmoid (x)  y = Mul (x, gate) }", {})
    apply_proven(RaiseSilu(), model, FEEDS)
    assert model.graph.outputs[0].name == "y"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("gate = Sigmoid (z)  y = Mul (x, gate)", "argument is not the other factor"),
        ("half = Add (x, x)  gate = Sigmoid (half)  y = Mul (x, gate)", "argument is not the other factor"),
        ("gate = Sigmoid (x)  silu = Mul (x, gate)  y = Add (silu, gate)", "something else reads the Sigmoid"),
    ],
)
def test_what_is_not_silu_stays(body: str, reason: str) -> None:
    model = make_model(f"{HEAD} {{ {body} }}", {})
    before = operators(model)
    (report,) = apply_proven(RaiseSilu(), model, FEEDS)
    assert report.matched == 0
    assert reason in report.skipped[0].reason
    assert operators(model) == before
    assert not model.functions
