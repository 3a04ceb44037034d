"""Gated layers of the CPU kernels inside of OpenVINO models."""

from __future__ import annotations

import numpy as np
import openvino
import pytest
from openvino import opset13 as operators
from openvino_models import constant, executed, named, open_model

from sdc.engines.kernels.convolution import Quantisation
from sdc.engines.sessions.openvino_gate import _match, gates_taken, replace_gates
from sdc.engines.sessions.openvino_operators import Replacements
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec

WIDTH, OUTPUTS = 128, 4608
FREE = {"B": DimensionRange(1, 2, 4), "S": DimensionRange(1, 192, 4096)}
SPEC = ComponentSpec(
    "unet",
    (TensorSpec("x", "float32", ("B", "S", WIDTH)),),
    (TensorSpec("y", "float32", ("B", "S", 8)),),
    FREE,
)
USUAL = {"x": (2, 192, WIDTH)}


def multiply(
    x, outputs: int, *, seed: int, element_type: str, bytes: bool = False, bias: bool = True, half: bool = False
) -> list:
    """With bias and without."""
    generator = np.random.default_rng(seed)
    inputs = x.get_output_partial_shape(0)[2].get_length()
    if bytes:
        integers = operators.constant(generator.integers(-127, 128, (inputs, outputs), np.int8))
        scales = constant(generator.uniform(0.5, 1.5, (1, outputs)) / 73 / np.sqrt(inputs), element_type)
        weight = operators.multiply(operators.convert(integers, element_type), scales)
    elif half:
        floats = generator.standard_normal((inputs, outputs)) / np.sqrt(inputs)
        weight = operators.convert(operators.constant(floats.astype(np.float16)), element_type)
    else:
        weight = constant(generator.standard_normal((inputs, outputs)) / np.sqrt(inputs), element_type)
    y = operators.matmul(x, weight, False, False)
    return [operators.add(constant(generator.standard_normal(outputs), element_type), y) if bias else y, y]


def build_model(
    *, element_type: str = "f32", bytes: bool = False, second_bytes: bool | None = None, bias: bool = True,
    mode: str = "erf", reader: str = "", other_input: bool = False, half: bool = False,
) -> openvino.Model:  # fmt: skip
    """A gated layer and one behind it; every precondition of the replacement can be broken."""
    x = operators.parameter([-1, -1, WIDTH], openvino.Type.f32, name="x")
    tokens = operators.multiply(operators.convert(x, element_type), constant(np.full(1, 0.3), element_type))

    def quantised(tokens):
        bounds = [operators.constant(np.float32(bound)) for bound in (-1.28, 1.27, -1.28, 1.27)]
        rounded = operators.fake_quantize(operators.convert(tokens, "f32"), *bounds, 256)
        return operators.convert(rounded, element_type)

    source = quantised(tokens) if bytes else tokens
    other = operators.relu(source) if other_input else source
    values, product = multiply(source, OUTPUTS, seed=1, element_type=element_type, bytes=bytes, bias=bias, half=half)
    of_bytes = bytes if second_bytes is None else second_bytes
    gates = multiply(other, OUTPUTS, seed=2, element_type=element_type, bytes=of_bytes, bias=bias, half=half)[0]
    active = operators.gelu(gates, mode)
    gated = operators.multiply(values, active)
    y = operators.convert(multiply(gated, 8, seed=3, element_type=element_type)[0], "f32")
    read = {"product": product, "values": values, "gates": gates, "active": active}.get(reader)
    model = openvino.Model([y, *([operators.relu(read)] if read is not None else [])], [x], "gate")
    return named(model)


def feeds(*, batch: int = 2, tokens: int = 192) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(3).standard_normal((batch, tokens, WIDTH), np.float32)}


def replaced(model: openvino.Model, convolver, shapes=USUAL) -> list:
    """The operators that are put into a model."""
    replacements = Replacements()
    replace_gates(model, convolver, shapes, replacements)
    return replacements.operators


OPTIONS = (
    {},
    {"half": True},
    {"bias": False},
    {"element_type": "bf16"},
    {"bytes": True},
    {"bytes": True, "element_type": "f16"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_put_in_and_no_further_from_float32_than_openvinos_own(convolver, monkeypatch, tmp_path, options):
    found = {}
    for name, precision, switch in (("exact", "f32", "1"), ("openvino", "bf16", "attention"), ("kernel", "bf16", "1")):
        monkeypatch.setenv("SDC_KERNELS", switch)
        # A model of bf16 is computed in bf16, whatever is asked for.
        built = build_model(**(options | {"element_type": "f32"} if name == "exact" else options))
        with open_model(SPEC, built, tmp_path, precision) as session:
            found[name] = session.run(feeds())["y"]
            kinds = executed(session)
        assert kinds.count("Reference") == (name == "kernel")
        assert kinds.count("FullyConnected") == (1 if name == "kernel" else 3)
    errors = {name: np.linalg.norm(found[name] - found["exact"]) for name in ("openvino", "kernel")}
    assert errors["kernel"] < 0.01 * np.linalg.norm(found["exact"])
    # OpenVINO rounds to 256 levels what it has in float32 still, and the kernel what is rounded to bf16.
    assert errors["kernel"] <= (1.15 if "bytes" in options else 1.05) * errors["openvino"]


def test_takes_several_shapes_in_turn(convolver, tmp_path):
    with (
        open_model(SPEC, build_model(), tmp_path, "bf16") as session,
        open_model(SPEC, build_model(), tmp_path, "f32") as exact,
    ):
        for sizes in ({"batch": 1, "tokens": 5}, {}, {"batch": 3, "tokens": 333}):
            given = feeds(**sizes)
            expected = exact.run(given)["y"]
            assert np.linalg.norm(session.run(given)["y"] - expected) < 0.01 * np.linalg.norm(expected)
        assert executed(session).count("Reference") == 1


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "tanh"},
        {"bytes": True, "second_bytes": False},
        {"other_input": True},
        {"reader": "product"},
        {"reader": "values"},
        {"reader": "gates"},
        {"reader": "active"},
    ],
    ids=str,
)
def test_leaves_other_patterns_alone(packer, options):
    model = build_model(**options)
    before = [node.get_type_name() for node in model.get_ordered_ops()]
    found = replaced(model, packer)
    assert not found
    assert [node.get_type_name() for node in model.get_ordered_ops()] == before


def test_how_tokens_are_quantised(packer):
    (operator,) = replaced(build_model(bytes=True), packer)
    assert operator.weights.quantisation == Quantisation(pytest.approx(0.01), 128)


def test_leaves_small_ones_alone_and_shapes_free(packer):
    model = build_model()
    free = [port.get_partial_shape() for port in model.inputs]
    assert not replaced(model, packer, {"x": (1, 100, WIDTH)})
    assert replaced(model, packer)
    assert [port.get_partial_shape() for port in model.inputs] == free


def test_weights_are_not_copied_before_they_are_packed(packer):
    """All sites together would be as large as the model."""
    model = build_model(element_type="f16", half=True)
    sites = [site for node in model.get_ordered_ops() if node.get_type_name() == "Gelu" and (site := _match(node))]
    (site,) = sites
    assert not any(operands.weights.flags.owndata for operands in site.operands)


@pytest.mark.parametrize(
    ("options", "tokens", "count"),
    [({}, 192, 2), ({"bytes": True}, 192, 2), ({}, 50, 0), ({"mode": "tanh"}, 192, 0)],
)
def test_what_will_be_taken_is_known_beforehand(packer, options, tokens, count):
    model, shapes = build_model(**options), {"x": (2, tokens, WIDTH)}
    free = model.inputs[0].get_partial_shape()
    taken = gates_taken(model, shapes)
    assert model.inputs[0].get_partial_shape() == free
    first = [node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"][:2]
    assert taken == set(first[:count])
    assert len(replaced(model, packer, shapes)) == count // 2
