"""Attention of the CPU kernels inside of OpenVINO models."""

from __future__ import annotations

import gc

import numpy as np
import openvino
import pytest
from openvino import opset13 as operators
from openvino_models import executed, named, open_model, operators_alive

from sdc.engines.sessions.openvino_attention import KernelAttention, replace_attention
from sdc.engines.sessions.openvino_operators import Replacements
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec

HEADS, SIZE = 3, 40
WIDTH = HEADS * SIZE
FREE = {"B": DimensionRange(1, 2, 8), "S": DimensionRange(1, 1024, 4096), "T": DimensionRange(1, 1024, 4096)}
LARGE = {"x": (2, 1040, 50), "context": (2, 1040, 50)}
SPEC = ComponentSpec(
    "unet",
    (TensorSpec("x", "float32", ("B", "S", 50)), TensorSpec("context", "float32", ("B", "T", 50))),
    (TensorSpec("y", "float32", ("B", "S", 50)),),
    FREE,
)


def weight(rows: int, columns: int, seed: int):
    values = np.random.default_rng(seed).standard_normal((rows, columns), np.float32) * rows**-0.5
    return operators.constant(values)


def split(value, *, heads: int = HEADS, shape: tuple[int, ...] | None = None, order=(0, 2, 1, 3)):
    target = np.array(shape or (0, 0, heads, WIDTH // heads))
    return operators.transpose(operators.reshape(value, target, True), list(order))


def build_model(
    *, heads: int = HEADS, mask=None, scale: float | None = None, causal: bool = False, order=(0, 2, 1, 3),
    shape: tuple[int, ...] | None = None, merged=(0, 0, WIDTH), extra_reader: bool = False, element_type: str = "f32",
    levels: int | None = None, whole_reader: bool = False,
) -> openvino.Model:  # fmt: skip
    """Projections, attention, output projection; every precondition of the replacement can be broken."""
    x = operators.parameter([-1, -1, 50], openvino.Type.f32, name="x")
    context = operators.parameter([-1, -1, 50], openvino.Type.f32, name="context")
    query, key, value = (
        split(
            operators.convert(operators.matmul(source, weight(50, WIDTH, seed), False, False), element_type),
            heads=heads,
            shape=shape,
            order=order,
        )
        for seed, source in enumerate((x, context, context))
    )
    rest = [] if mask is None else [operators.convert(operators.constant(np.asarray(mask, np.float32)), element_type)]
    if scale is not None:
        zero, factor = (operators.convert(operators.constant(np.float32(each)), element_type) for each in (0, scale))
        rest = [*(rest or [zero]), factor]
    attention = operators.scaled_dot_product_attention(query, key, value, *rest, causal=causal)
    transposed = operators.transpose(attention, list(order))
    joined = operators.reshape(transposed, np.array(merged), True)
    whole = operators.convert(joined, "f32")
    rounded = whole if levels is None else operators.fake_quantize(whole, -3.0, 3.0, -3.0, 3.0, levels)
    y = operators.matmul(rounded, weight(WIDTH, 50, 9), False, False)
    results = [y, *([transposed] if extra_reader else []), *([whole] if whole_reader else [])]
    model = openvino.Model(results, [x, context], "attention")
    return named(model, "x", "context")


def feeds(*, batch: int = 2, rows: int = 130, context: int = 77) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    return {
        "x": 2 * generator.standard_normal((batch, rows, 50), np.float32),
        "context": generator.standard_normal((batch, context, 50), np.float32),
    }


def replaced(model: openvino.Model, kernels, shapes, **options) -> list:
    """The operators that are put into a model."""
    replacements = Replacements()
    replace_attention(model, kernels, shapes, replacements, **options)
    return replacements.operators


@pytest.mark.parametrize(
    "options",
    [
        {}, {"causal": True}, {"scale": 0.3}, {"mask": 0.0}, {"merged": (0, -1, WIDTH)}, {"element_type": "f16"},
        {"element_type": "bf16", "scale": 0.1875},
    ],
    ids=str,
)  # fmt: skip
def test_is_put_in_and_no_further_from_float32_than_openvinos_own(kernels, monkeypatch, tmp_path, options):
    found = {}
    large = {"rows": 1040, "context": 1040}
    for name, precision, switch in (("exact", "f32", "1"), ("openvino", "bf16", "0"), ("kernel", "bf16", "1")):
        monkeypatch.setenv("SDC_KERNELS", switch)
        with open_model(SPEC, build_model(**options), tmp_path, precision) as session:
            found[name] = session.run(feeds(**large))["y"]
            assert executed(session).count("Reference") == (name == "kernel")
    errors = {name: np.linalg.norm(found[name] - found["exact"]) for name in ("openvino", "kernel")}
    # A logit of size 5 has the error 5 * 2^-9 from its operands in bf16, and so has the power of it.
    assert errors["kernel"] < 0.02 * np.linalg.norm(found["exact"])
    assert errors["kernel"] <= 1.05 * errors["openvino"]


@pytest.mark.parametrize(
    ("options", "in_bytes"),
    [
        ({}, False),
        ({"levels": 256}, True),
        ({"levels": 255, "element_type": "f16"}, True),
        ({"levels": 65536}, False),
        ({"levels": 256, "whole_reader": True}, False),
    ],
    ids=str,
)
def test_is_in_8_bits_where_its_result_is_rounded_to_8_bits(kernels, options, in_bytes):
    """Nothing but the readers of the result tells what an engine's precision is there."""
    (operator,) = replaced(build_model(**options), kernels, LARGE)
    assert operator.settings.eight_bits is in_bytes
    (operator,) = replaced(build_model(**options), kernels, LARGE, eight_bits=False)
    assert not operator.settings.eight_bits


def test_8_bits_can_be_switched_off(kernels, monkeypatch, tmp_path):
    found = {}
    for switch in ("avx512,bf16", "avx512"):
        monkeypatch.setenv("SDC_KERNELS", switch)
        with open_model(SPEC, build_model(levels=256), tmp_path, "bf16") as session:
            found[switch] = session.run(feeds(rows=1040, context=1040))["y"]
            operator = session._engine.replacements.operators[0]
            assert operator.settings.eight_bits == (switch == "avx512")
    # Two roundings to 256 levels of values that differ by the error of 8 bits in attention.
    difference = np.linalg.norm(np.subtract(*found.values())) / np.linalg.norm(found["avx512,bf16"])
    assert 0.002 < difference < 0.03


def test_takes_several_shapes_in_turn(kernels, tmp_path):
    with (
        open_model(SPEC, build_model(), tmp_path, "bf16") as session,
        open_model(SPEC, build_model(), tmp_path, "f32") as exact,
    ):
        for sizes in ({"batch": 1, "rows": 5, "context": 9}, {}, {"batch": 3, "rows": 64, "context": 300}):
            given = feeds(**sizes)
            expected = exact.run(given)["y"]
            assert np.linalg.norm(session.run(given)["y"] - expected) < 0.01 * np.linalg.norm(expected)


def test_runs_make_no_operators_that_stay(kernels, tmp_path):
    with open_model(SPEC, build_model(), tmp_path, "bf16") as session:
        session.run(feeds())
        session.run(feeds(rows=131))  # from now on it takes any size
        before = operators_alive(KernelAttention)
        for rows in (130, 131, 130):
            session.run(feeds(rows=rows))
        assert operators_alive(KernelAttention) == before > 0


@pytest.mark.parametrize("closed", [True, False])
def test_a_session_lets_go_of_the_graph(kernels, tmp_path, closed):
    """The operators themselves are never freed by OpenVINO, but what they read is."""
    others = [open_model(SPEC, build_model(), tmp_path, "bf16") for _ in range(2)]
    session = open_model(SPEC, build_model(), tmp_path, "bf16")
    session.run(feeds(rows=1040, context=1040))
    members = list(session._engine.replacements.operators)
    assert [len(member.inputs()) for member in members] == [3] * len(members)
    if closed:
        session.close()
    del session
    gc.collect()
    assert [len(member.inputs()) for member in members] == [0] * len(members)
    results = [other.run(feeds())["y"] for other in others]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": np.zeros((1, 1, 1040, 1040))},
        {"mask": 1.0},
        {"scale": -0.1},
        {"heads": 8},
        {"shape": (0, 0, HEADS, -1), "order": (0, 1, 2, 3)},
        {"shape": (-1, 26, HEADS, SIZE)},
        {"merged": (-1, 10, WIDTH)},
        {"extra_reader": True},
    ],
    ids=str,
)
def test_leaves_other_patterns_alone(kernels, options):
    model = build_model(**options)
    before = [node.get_type_name() for node in model.get_ordered_ops()]
    assert not replaced(model, kernels, LARGE)
    assert [node.get_type_name() for node in model.get_ordered_ops()] == before


def test_leaves_small_attention_alone_and_shapes_free(kernels):
    model = build_model()
    free = [port.get_partial_shape() for port in model.inputs]
    assert not replaced(model, kernels, {"x": (2, 256, 50), "context": (2, 77, 50)})
    assert replaced(model, kernels, {"x": (2, 4096, 50), "context": (2, 77, 50)})
    assert [port.get_partial_shape() for port in model.inputs] == free
