"""Roles of layers and the policy over them, on a network in which a weight's name says its expected role."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import make_denoiser, make_fused_denoiser, make_model

from sdc.engines.errors import PassError
from sdc.passes.precision.layer_roles import Role
from sdc.passes.precision.quantisation import find_layers


def expected_role(weight: str) -> Role:
    return Role(re.sub(r"^w_|_\d$", "", weight).replace("_", "-").replace("time", "timestep"))


def found_roles(model: ir.Model) -> dict[str, Role]:
    return {layer.weight.name or "": layer.role for layer in find_layers(model)[0]}


def test_every_role_is_found_in_plain_and_fused_graph():
    plain = make_denoiser()
    roles = found_roles(plain)
    assert roles == {weight: expected_role(weight) for weight in roles}
    assert set(roles.values()) == set(Role)
    assert found_roles(make_fused_denoiser()) == roles


def test_names_do_not_matter():
    model = make_denoiser()
    expected = list(found_roles(model).values())
    for index, value in enumerate([*model.graph.initializers.values(), *(o for n in model.graph for o in n.outputs)]):
        value.name = f"v{index}"
    assert list(found_roles(model).values()) == expected


def test_shape_of_the_picture_is_no_dependence_on_it():
    # The timestep is expanded to the batch of `sample`, whose shape is read: its layers stay TIMESTEP.
    model = make_denoiser()
    assert [n.op_type for n in model.graph if "sample" in {v.name for v in n.inputs if v}].count("Shape") == 2
    assert found_roles(model)["w_time_1"] is Role.TIMESTEP


SINGLE = (
    '<ir_version: 10, opset_import: ["": 23]> g (float[N, 6, 5, 7] x, float[N, 6, 5, 7] z) => (float[A, B] y) {{ {} }}'
)


@pytest.mark.parametrize(
    ("body", "weight", "reason"),
    [
        ("y = MatMul (x, z)", None, "product of two activations"),
        ("y = MatMul (w, x)", (5, 5), "product of two activations"),
        ("y = MatMul (x, w)", (2, 7, 3), "rank 3"),
        ("y = Conv <group = 2> (x, w)", (4, 3, 1, 1), "2 groups"),
        ("f = Flatten (x) y = Gemm <transA = 1> (f, w)", (3, 4), "transposed activation"),
    ],
)
def test_what_cannot_be_a_layer(body: str, weight: tuple[int, ...] | None, reason: str):
    weights = {} if weight is None else {"w": np.ones(weight, np.float32)}
    layers, skipped = find_layers(make_model(SINGLE.format(body), weights))
    assert not layers
    assert reason in skipped[0].reason


def test_integer_weight_is_no_layer():
    text = '<ir_version: 10, opset_import: ["": 23]> g (int32[N, 6] x) => (int32[N, 5] y) { y = MatMul (x, w) }'
    layers, skipped = find_layers(make_model(text, {"w": np.ones((6, 5), np.int32)}))
    assert not layers
    assert "INT32" in skipped[0].reason


def test_input_of_unknown_rank_is_refused():
    model = make_denoiser()
    model.graph.inputs[0].shape = None
    with pytest.raises(PassError, match="no known rank"):
        find_layers(model)


def test_other_head_of_the_shortcut_decides():
    # With its second reader gone, the residual stream in front of the shortcut ends there.
    model = make_denoiser()
    norm = next(node for node in model.graph if node.op_type == "GroupNormalization")
    norm.replace_input_with(0, model.graph.inputs[0])
    model.graph.inputs[0].shape = ir.Shape(["B", 6, "H", "W"])
    assert found_roles(model)["w_shortcut"] is Role.PROJECTION_OUT
