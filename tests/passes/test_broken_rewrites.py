"""Equality notices a fusion that went wrong, whichever it is.

Every fused operator is broken in the ways in which its rewrite could have been: another axis, a dropped epsilon,
swapped operands. The broken graph has to fail the comparison that the right one passes, by an order of magnitude.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from equality import FP32, make_model, relative_error, run_model
from small_graphs import RESNET, feed_attention, feed_resnet, make_attention, make_resnet, normal
from test_fuse_group_norm_neighbours import JOIN_FEEDS, LITERAL_FEEDS, make_join, make_literal
from transformer_graph import FEEDS, TRANSFORMER, make_transformer

from sdc.passes import domain
from sdc.passes.base import run_passes
from sdc.passes.pipeline import fusion_passes
from sdc.passes.raising.raise_quick_gelu import RaiseQuickGelu
from sdc.passes.raising.raise_silu import RaiseSilu
from sdc.passes.simplify.lift_constants import LiftConstants

Break = Callable[[ir.Model, list[ir.Node]], None]

# The LayerNorm's variance is near 1: only a large epsilon can be missed.
LAYER_NORM = TRANSFORMER.replace("axis = -1, epsilon = 1e-3", "axis = -1, epsilon = 0.3")
PLAIN_RESIDUAL = LAYER_NORM.replace("biased1 = Add (product1, b1)", "biased1 = Neg (product1)")
PLAIN_SILU = RESNET.replace("gate2 = Sigmoid (normed2)", "n = Neg (normed2)  gate2 = Sigmoid (n)")
PLAIN_SILU = PLAIN_SILU.replace("Mul (gate2, normed2)", "Mul (gate2, n)")

QUICK_GELU = """<ir_version: 10, opset_import: ["": 23]> g (float[3, 7] x) => (float[3, 7] y)
    <float factor = {1.702}> { scaled = Mul (x, factor)  gate = Sigmoid (scaled)  y = Mul (x, gate) }"""

GRAPHS: dict[str, tuple[Callable[[], ir.Model], list[dict[str, np.ndarray]]]] = {
    domain.SILU: (lambda: make_resnet(PLAIN_SILU), [feed_resnet()]),
    domain.QUICK_GELU: (lambda: make_model(QUICK_GELU, {}), [{"x": normal(61, 3, 7)}]),
    domain.GROUP_NORM_SILU: (
        lambda: make_resnet(RESNET.replace("Add (first, shift)", "Mul (first, shift)")),
        [feed_resnet(), feed_resnet(scale=0.05)],
    ),
    domain.ADD_GROUP_NORM_SILU: (make_resnet, [feed_resnet(), feed_resnet(scale=0.01)]),
    domain.ADD_GROUP_NORM: (make_transformer, FEEDS),
    domain.CONCAT_GROUP_NORM_SILU: (make_join, JOIN_FEEDS),
    domain.GROUP_NORM_SILU_ADD: (make_literal, LITERAL_FEEDS),
    domain.ADD_LAYER_NORM: (lambda: make_transformer(PLAIN_RESIDUAL), FEEDS),
    domain.BIAS_ADD_LAYER_NORM: (lambda: make_transformer(LAYER_NORM), FEEDS),
    domain.BIAS_GEGLU: (make_transformer, FEEDS),
    domain.BIAS_ADD: (make_transformer, FEEDS),
    domain.TOKENS_FROM_IMAGE: (make_transformer, FEEDS),
    domain.IMAGE_FROM_TOKENS: (make_transformer, FEEDS),
    domain.MULTI_HEAD_ATTENTION: (make_attention, [feed_attention()]),
}
"""A graph that holds each operator, and feeds among which small ones make epsilon matter."""


def swapped(first: int, second: int) -> Break:
    """Two operands of every site change places."""

    def apply(_: ir.Model, sites: list[ir.Node]) -> None:
        for node in sites:
            one, other = node.inputs[first], node.inputs[second]
            node.replace_input_with(first, other)
            node.replace_input_with(second, one)

    return apply


def operand(index: int, source: int) -> Break:
    """An operand is taken twice, another forgotten."""

    def apply(_: ir.Model, sites: list[ir.Node]) -> None:
        for node in sites:
            node.replace_input_with(index, node.inputs[source])

    return apply


def attribute(name: str, value: float | str) -> Break:
    """An attribute is lost or wrong."""

    def apply(_: ir.Model, sites: list[ir.Node]) -> None:
        for node in sites:
            node.attributes[name] = ir.convenience.convert_attribute(name, value)

    return apply


def body(old: str, new: str) -> Break:
    """The operator computes something else."""

    def apply(model: ir.Model, sites: list[ir.Node]) -> None:
        operator = sites[0].op_type
        text, count = re.subn(re.escape(old), new, domain._BODIES[operator])
        assert count == 1, f"{old!r} is not in the body of {operator}"
        model.functions[domain.DOMAIN, operator, ""] = ir.serde.deserialize_function(onnx.parser.parse_function(text))

    return apply


def outputs_swapped(_: ir.Model, sites: list[ir.Node]) -> None:
    """The sum is read where the norm is meant."""
    for node in sites:
        y, total = node.outputs
        readers = list(y.uses())
        assert readers
        for reader, index in readers:
            reader.replace_input_with(index, total)


def affine_swapped(model: ir.Model, sites: list[ir.Node]) -> None:
    """Gamma and beta, the last two operands, change places."""
    for node in sites:
        swapped(len(node.inputs) - 2, len(node.inputs) - 1)(model, [node])


EPSILON = {"no epsilon": attribute("epsilon", 0.0), "other epsilon": attribute("epsilon", 1e-1)}
GROUP_NORM = EPSILON | {
    "groups merged": attribute("num_groups", 1),
    "gamma and beta swapped": affine_swapped,
}
NO_SILU = {"no gate": body("gate = Sigmoid (normed)", "gate = Identity (normed)")}

BROKEN: dict[str, dict[str, Break]] = {
    domain.SILU: {
        "gate of the wrong sign": body("gate = Sigmoid (x)", "minus = Neg (x)\ngate = Sigmoid (minus)"),
        "no product": body("y = Mul (x, gate)", "y = Identity (gate)"),
    },
    domain.QUICK_GELU: {
        "Silu": body("scaled = Mul (x, factor_like_x)", "scaled = Identity (x)"),
        "no product": body("y = Mul (x, gate)", "y = Identity (gate)"),
    },
    domain.GROUP_NORM_SILU: GROUP_NORM | NO_SILU,
    domain.ADD_GROUP_NORM_SILU: GROUP_NORM
    | NO_SILU
    | {"added to itself": operand(1, 0), "norm read as sum": outputs_swapped},
    domain.ADD_GROUP_NORM: GROUP_NORM | {"added to itself": operand(1, 0), "norm read as sum": outputs_swapped},
    domain.CONCAT_GROUP_NORM_SILU: GROUP_NORM
    | NO_SILU
    | {"wrong order": body("Concat <axis = 1> (x, skip)", "Concat <axis = 1> (skip, x)")},
    domain.GROUP_NORM_SILU_ADD: GROUP_NORM
    | NO_SILU
    | {
        "nothing added": body("y = Add (active, addend)", "y = Identity (active)"),
        "added before the gate": body(
            "y = Add (active, addend)", "total = Add (normed, addend)\ny = Mul (total, gate)"
        ),
    },
    domain.ADD_LAYER_NORM: EPSILON
    | {
        "gamma and beta swapped": affine_swapped,
        "added to itself": operand(1, 0),
        "norm read as sum": outputs_swapped,
        "sum before the residual": body("sum = Add (x, residual)", "sum = Add (x, x)"),
    },
    domain.BIAS_ADD_LAYER_NORM: EPSILON
    | {
        "gamma and beta swapped": affine_swapped,
        "bias and gamma swapped": swapped(1, 3),
        "no bias": body("biased = Add (x, bias)", "biased = Identity (x)"),
        "bias after the norm": body("sum = Add (biased, residual)", "sum = Add (x, residual)"),
        "norm read as sum": outputs_swapped,
    },
    domain.BIAS_GEGLU: {
        "halves swapped": body("value, gate = Split", "gate, value = Split"),
        "tanh": attribute("approximate", "tanh"),
        "no bias": body("biased = Add (x, bias)", "biased = Identity (x)"),
        "gate of the sum": body("y = Mul (value, active)", "y = Add (value, active)"),
    },
    domain.BIAS_ADD: {
        "no bias": body("y = Add (biased, residual)", "y = Add (x, residual)"),
        "no residual": operand(2, 0),
    },
    domain.TOKENS_FROM_IMAGE: {"wrong axes": body("perm = [0, 2, 3, 1]", "perm = [0, 3, 2, 1]")},
    domain.IMAGE_FROM_TOKENS: {
        "not transposed": body(
            "channels_last = Reshape (x, shape)\n            y = Transpose <perm = [0, 3, 1, 2]> (channels_last)",
            "y0 = Concat <axis = 0> (batch, minus_one, size)\ny = Reshape (x, y0)",
        ),
    },
    domain.MULTI_HEAD_ATTENTION: {
        "keys and values swapped": swapped(1, 2),
        "scale forgotten": attribute("scale", 1.0),
        "other heads": attribute("num_heads", 5),
        "causal": attribute("is_causal", 1),
        "keys read as values": body("v = Transpose <perm = [0, 2, 1, 3]> (value_split)", "v = Identity (k)"),
    },
}


def fuse(operator: str) -> tuple[ir.Model, list[dict[str, np.ndarray]], list[ir.Node]]:
    """The graph fused, what it gave before, and the sites of `operator`."""
    make, feeds = GRAPHS[operator]
    model = make()
    expected = [run_model(model, each) for each in feeds]
    run_passes([LiftConstants(), RaiseQuickGelu(), RaiseSilu(), *fusion_passes()], model)
    return model, expected, [node for node in model.graph if domain.is_fused(node, operator)]


def largest_error(operator: str, model: ir.Model, expected: list[dict[str, np.ndarray]]) -> float:
    feeds = GRAPHS[operator][1]
    return max(relative_error(model, outputs, each) for outputs, each in zip(expected, feeds, strict=True))


def test_every_operator_is_broken() -> None:
    assert set(BROKEN) == set(domain.OPERATORS)


@pytest.mark.parametrize("operator", domain.OPERATORS)
def test_right_rewrite_passes(operator: str) -> None:
    model, expected, sites = fuse(operator)
    assert sites
    assert largest_error(operator, model, expected) <= FP32


@pytest.mark.parametrize(
    ("operator", "kind"), [(operator, kind) for operator, kinds in BROKEN.items() for kind in kinds]
)
def test_broken_rewrite_fails(operator: str, kind: str) -> None:
    model, expected, sites = fuse(operator)
    BROKEN[operator][kind](model, sites)
    assert largest_error(operator, model, expected) > 10 * FP32
