"""Attention of the CPU kernels inside of OpenVINO models."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import openvino
import pytest
from openvino import opset13 as operators

from sdc.engines.kernels.library import Kernels, find_kernels
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.sessions.openvino_attention import replace_attention
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec

HEADS, SIZE = 3, 40
WIDTH = HEADS * SIZE
FREE = {name: DimensionRange(1, 2, 4096) for name in ("B", "S", "T")}
SPEC = ComponentSpec(
    "unet",
    (TensorSpec("x", "float32", ("B", "S", 50)), TensorSpec("context", "float32", ("B", "T", 50))),
    (TensorSpec("y", "float32", ("B", "S", 50)),),
    FREE,
)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = find_kernels()
    if isinstance(found, str):
        pytest.skip(f"no CPU kernels: {found}")
    return found


def weight(rows: int, columns: int, seed: int):
    values = np.random.default_rng(seed).standard_normal((rows, columns), np.float32) * rows**-0.5
    return operators.constant(values)


def split(value, *, heads: int = HEADS, shape: tuple[int, ...] | None = None, order=(0, 2, 1, 3)):
    target = np.array(shape or (0, 0, heads, WIDTH // heads))
    return operators.transpose(operators.reshape(value, target, True), list(order))


def build_model(
    *, heads: int = HEADS, mask=None, scale: float | None = None, causal: bool = False, order=(0, 2, 1, 3),
    shape: tuple[int, ...] | None = None, merged=(0, 0, WIDTH), extra_reader: bool = False,
) -> openvino.Model:  # fmt: skip
    """Projections, attention, output projection; every precondition of the replacement can be broken."""
    x = operators.parameter([-1, -1, 50], openvino.Type.f32, name="x")
    context = operators.parameter([-1, -1, 50], openvino.Type.f32, name="context")
    query, key, value = (
        split(operators.matmul(source, weight(50, WIDTH, seed), False, False), heads=heads, shape=shape, order=order)
        for seed, source in enumerate((x, context, context))
    )
    rest = [] if mask is None else [operators.constant(np.asarray(mask, np.float32))]
    if scale is not None:
        rest = [*(rest or [operators.constant(np.float32(0))]), operators.constant(np.float32(scale))]
    attention = operators.scaled_dot_product_attention(query, key, value, *rest, causal=causal)
    transposed = operators.transpose(attention, list(order))
    joined = operators.reshape(transposed, np.array(merged), True)
    y = operators.matmul(joined, weight(WIDTH, 50, 9), False, False)
    results = [y, transposed] if extra_reader else [y]
    model = openvino.Model(results, [x, context], "attention")
    for port, name in zip((*model.inputs, model.outputs[0]), ("x", "context", "y"), strict=True):
        port.get_tensor().set_names({name})
    return model


def feeds(*, batch: int = 2, rows: int = 130, context: int = 77) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    return {
        "x": 2 * generator.standard_normal((batch, rows, 50), np.float32),
        "context": generator.standard_normal((batch, context, 50), np.float32),
    }


def open_model(model: openvino.Model, folder: Path, precision: str):
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    files = (folder / "model.xml", folder / "model.bin")
    return open_session(EngineSource(SPEC, "openvino", files, {"inference_precision": precision}))


def executed(session) -> list[str]:
    """The kinds of nodes that the plugin runs."""
    return [node.get_rt_info()["layerType"].astype(str) for node in session._compiled.get_runtime_model().get_ops()]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.3}, {"mask": 0.0}, {"merged": (0, -1, WIDTH)}])
def test_is_put_in_and_no_further_from_float32_than_openvinos_own(kernels, monkeypatch, tmp_path, options):
    found = {}
    for name, precision, switch in (("exact", "f32", "1"), ("openvino", "bf16", "0"), ("kernel", "bf16", "1")):
        monkeypatch.setenv("SDC_KERNELS", switch)
        with open_model(build_model(**options), tmp_path, precision) as session:
            assert executed(session).count("Reference") == (name == "kernel")
            found[name] = session.run(feeds())["y"]
    errors = {name: np.linalg.norm(found[name] - found["exact"]) for name in ("openvino", "kernel")}
    assert errors["kernel"] < 0.01 * np.linalg.norm(found["exact"])
    assert errors["kernel"] <= 1.05 * errors["openvino"]


def test_takes_several_shapes_in_turn(kernels, tmp_path):
    with open_model(build_model(), tmp_path, "bf16") as session, open_model(build_model(), tmp_path, "f32") as exact:
        for sizes in ({"batch": 1, "rows": 5, "context": 9}, {}, {"batch": 3, "rows": 64, "context": 300}):
            given = feeds(**sizes)
            expected = exact.run(given)["y"]
            assert np.linalg.norm(session.run(given)["y"] - expected) < 0.01 * np.linalg.norm(expected)


def test_lives_as_long_as_its_session(kernels, tmp_path):
    sessions = [open_model(build_model(), tmp_path, "bf16") for _ in range(3)]
    gc.collect()
    first = [session.run(feeds())["y"] for session in sessions]
    sessions[1].close()
    gc.collect()
    np.testing.assert_array_equal(sessions[2].run(feeds())["y"], first[0])
    assert not sessions[1]._attention


@pytest.mark.parametrize(
    "options",
    [
        {"mask": np.zeros((1, 1, 130, 77))},
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
    assert replace_attention(model, kernels) == []
    assert [node.get_type_name() for node in model.get_ordered_ops()] == before
