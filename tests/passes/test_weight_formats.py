"""Weights in four bits, eight bits and eight-bit floats, against NumPy; and what the backends make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from small_denoiser import make_model, make_table, run_model

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.engines.errors import InputError
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import ComponentSpec, TensorSpec
from sdc.engines.targets import TARGETS
from sdc.passes.base import PassReport, run_passes
from sdc.passes.pipeline import lowering_passes
from sdc.passes.precision.cast_bf16 import CastBf16
from sdc.passes.precision.cast_fp16 import CastFp16
from sdc.passes.precision.formats import Format
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.plan import uniform_plan
from sdc.passes.precision.weight_blocks import quantise_blocks

LAYERS = {
    "conv": ("y = Conv <pads = [1, 1, 1, 1]> (x, w)", (2, 32, 5, 7), (11, 32, 3, 3)),
    "matmul": ("y = MatMul (x, w)", (2, 5, 96), (96, 11)),
    "gemm": ("y = Gemm (x, w)", (5, 64), (64, 11)),
    "gemm-transposed": ("y = Gemm <transB = 1> (x, w)", (5, 64), (11, 64)),
}


def make_layer(name: str) -> ir.Model:
    body, x_shape, w_shape = LAYERS[name]
    dimensions, result = ", ".join(map(str, x_shape)), ", ".join(["2"] * len(x_shape))
    text = f'<ir_version: 10, opset_import: ["": 23]> g (float[{dimensions}] x) => (float[{result}] y) {{ {body} }}'
    random = np.random.default_rng(7)
    model = make_model(text, {"w": random.standard_t(4, w_shape).astype(np.float32) / 10})
    model.graph.outputs[0].shape = ir.Shape(["a", "b", "c", "d"][: len(x_shape)])
    return model


def feed(name: str) -> np.ndarray:
    return np.random.default_rng(8).normal(size=LAYERS[name][1]).astype(np.float32)


def insert(model: ir.Model, wanted: Format, *, limit: float = 4.0) -> PassReport:
    plan = uniform_plan(model, wanted, kept=frozenset())
    plan = replace(plan, layers=tuple(replace(layer, format=wanted) for layer in plan.layers))
    return InsertQdq(make_table(model, {"x": limit}), plan).run(model)


def rows_of(name: str, weight: np.ndarray) -> np.ndarray:
    """[output channels, weights of a row]."""
    return weight.T if name in ("matmul", "gemm") else weight.reshape(len(weight), -1)


def weight_of(name: str, rows: np.ndarray) -> np.ndarray:
    return (rows.T if name in ("matmul", "gemm") else rows).reshape(LAYERS[name][2])


def with_weight(name: str, weight: np.ndarray) -> ir.Model:
    model = make_layer(name)
    model.graph.initializers["w"].const_value = ir.tensor(weight.astype(np.float32), name="w")
    return model


@pytest.mark.parametrize("name", LAYERS)
def test_four_bits_are_block_integers(name: str):
    model, x = make_layer(name), feed(name)
    rows = rows_of(name, model.graph.initializers["w"].const_value.numpy())
    insert(model, Format.W4)
    stored = next(value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT4)
    scale = next(value for key, value in model.graph.initializers.items() if key.endswith("qdq_scale"))
    codes = stored.const_value.numpy().astype(np.int64)
    scales = scale.const_value.numpy()
    assert stored.const_value.nbytes == rows.size // 2
    if name in ("matmul", "gemm"):
        codes, scales = codes.T, scales.T
    assert codes.shape == rows.shape
    assert codes.min() >= -8
    assert codes.max() <= 7
    decoded = codes * np.repeat(scales, 32, axis=1)
    # A step is near 0.4 deviations, and its square / 12 is lost: 1.3 %, with heavy tails.
    assert np.square(decoded - rows).sum() < 0.02 * np.square(rows).sum()
    (expected,) = run_model(with_weight(name, weight_of(name, decoded)), {"x": x})
    (found,) = run_model(model, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_search_is_no_worse_than_any_single_step():
    rows = np.random.default_rng(3).standard_t(3, (13, 160)).astype(np.float32)
    codes, scales = quantise_blocks(rows, 32)
    found = np.square(codes * np.repeat(scales, 32, axis=1) - rows).reshape(13, 5, 32).sum(axis=2)
    blocks = rows.reshape(13, 5, 32)
    limit = np.abs(blocks).max(axis=2, keepdims=True)
    for part in (1 / 7, 0.9 / 7, 1 / 8):
        step = limit * part
        plain = np.square(np.clip(np.rint(blocks / step), -8, 7) * step - blocks).sum(axis=2)
        assert (found <= plain * 1.02).all()
        assert found.sum() < 0.97 * plain.sum()


def test_blocks_of_zeros_stay_zero():
    codes, scales = quantise_blocks(np.zeros((3, 64), np.float32), 32)
    assert not codes.any()
    assert np.isfinite(scales).all()
    assert scales.all()


def test_largest_weight_of_either_sign_is_reached():
    rows = np.zeros((2, 32), np.float32)
    rows[0, 3], rows[1, 5] = 1.0, -1.0
    codes, scales = quantise_blocks(rows, 32)
    np.testing.assert_allclose((codes * scales)[[0, 1], [3, 5]], [1.0, -1.0], rtol=2**-11)


def test_rows_that_do_not_divide_are_refused():
    body = "y = MatMul (x, w)"
    text = f'<ir_version: 10, opset_import: ["": 23]> g (float[5, 40] x) => (float[5, 3] y) {{ {body} }}'
    model = make_model(text, {"w": np.ones((40, 3), np.float32)})
    with pytest.raises(InputError, match="40 weights to a row, which do not divide into blocks of 32"):
        insert(model, Format.W4)


@pytest.mark.parametrize("name", LAYERS)
def test_eight_bit_floats(name: str):
    model, x = make_layer(name), feed(name)
    x[x > 3.9] = 1.0
    weight = model.graph.initializers["w"].const_value.numpy()
    insert(model, Format.FP8)
    rows = rows_of(name, weight)
    scale = next(value for key, value in model.graph.initializers.items() if key.endswith("w.qdq_scale"))
    steps = scale.const_value.numpy()[:, None]
    decoded = (rows / steps).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * steps
    assert np.abs(decoded - rows).max() <= 2.0**-4 * np.abs(rows).max()
    step = float(model.graph.initializers["x.fp8_scale"].const_value.numpy())
    assert step * 448 >= 4.0
    rounded = (x / np.float32(step)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(step)
    (expected,) = run_model(with_weight(name, weight_of(name, decoded)), {"x": rounded})
    (found,) = run_model(model, {"x": x})
    # NumPy and ONNX Runtime may round a value in the very middle to different sides.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def session_output(model: ir.Model, backend: str, x: np.ndarray, folder: Path) -> np.ndarray:
    spec = ComponentSpec("unet", (TensorSpec("x", "float32", x.shape),), (TensorSpec("y", "float32", ()),), {})
    target = next(target for target in TARGETS.values() if target.backend == backend)
    lowered = model.clone()
    run_passes(lowering_passes(backend), lowered)
    built = build_engine(Component(spec, lowered), target, folder)
    files = tuple(folder / file for file in built.files)
    with open_session(EngineSource(spec, backend, files, {"inference_precision": "f32"}), threads=1) as session:
        return session.run({"x": x})["y"]


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("wanted", [Format.W8, Format.W4])
@pytest.mark.parametrize("name", LAYERS)
def test_backends_leave_activations_alone(name: str, wanted: Format, backend: str, tmp_path: Path):
    # Both quantise activations of such layers by themselves unless they are told not to: an error of 5e-3.
    model, x = make_layer(name), feed(name)
    insert(model, wanted)
    (expected,) = run_model(model, {"x": x})
    found = session_output(model, backend, x, tmp_path)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


TENSORRT = [
    ("sm75", CastFp16, Format.W8),
    ("sm75", CastFp16, Format.INT8),
    ("sm80", CastBf16, Format.W8),
    ("sm86", CastFp16, Format.W4),
    ("sm86", CastBf16, Format.W4),
    ("sm89", CastFp16, Format.FP8),
    ("sm120", CastFp16, Format.FP8),
    ("sm121", CastBf16, Format.W4),
]


@pytest.mark.parametrize(("target", "cast", "wanted"), TENSORRT)
@pytest.mark.parametrize("name", ["conv", "matmul"])
def test_tensorrt_builds(name: str, target: str, cast: type, wanted: Format, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    model = make_layer(name)
    insert(model, wanted)
    run_passes([cast(), *lowering_passes("tensorrt_rtx")], model)
    spec = ComponentSpec("unet", (TensorSpec("x", "float32", LAYERS[name][1]),), (TensorSpec("y", "float32", ()),), {})
    built = build_engine(Component(spec, model), TARGETS[target], tmp_path)
    assert (tmp_path / built.files[0]).stat().st_size > 0


def test_bfloat16_graph():
    model, x = make_layer("matmul"), feed("matmul")
    (exact,) = run_model(model, {"x": x})
    report = CastBf16().run(model)
    assert report.matched == 1
    assert {value.dtype for value in model.graph.initializers.values() if value.uses()} == {ir.DataType.BFLOAT16}
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    assert found.dtype == np.float32
    # Operands are rounded to 2^-9 of themselves, sums of 96 products too.
    assert 0 < np.abs(found - exact).max() < 2.0**-6 * np.abs(exact).max()
