"""Activations behind Q/DQ with zero points, against integers in NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import (
    make_feeds,
    make_fused_denoiser,
    make_model,
    make_table,
    measure_table,
    quantise_everything,
    run_model,
)
from test_insert_qdq import LAYERS, make_layer, multiply, session_outputs

from sdc.engines.errors import PassError
from sdc.engines.processor import exact_weight_bits
from sdc.passes.precision.activation_qdq import affine_from_range
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.range_rules import METHODS, Range, RangeRule
from sdc.passes.precision.scales import scale_from_range

ASYMMETRIC = RangeRule("max", symmetric=False)
EXACT_HERE = replace(ASYMMETRIC, weight_bits=exact_weight_bits())
"""With weights whose products this processor sums exactly."""


def reference(name: str, model: ir.Model, x: np.ndarray, limits: Range) -> np.ndarray:
    """Integers throughout: (q_x - z) times q_w in int64, scaled once."""
    axis = LAYERS[name][3]
    w, b = (model.graph.initializers[key].const_value.numpy().astype(np.float64) for key in ("w", "b"))
    others = tuple(i for i in range(w.ndim) if i != axis)
    w_scale = scale_from_range(np.abs(w).max(axis=others, keepdims=True), 127).astype(np.float64)
    w_integers = np.round(w / w_scale).astype(np.int64)
    x_scale = np.float64(scale_from_range(np.array(limits.high - limits.low), 255))
    zero = round(-128 - limits.low / x_scale)
    x_integers = np.clip(np.round(x / np.float32(x_scale)) + zero, -128, 127).astype(np.int64)
    across = (-1, 1, 1) if name == "conv" else (-1,)
    product = multiply(name, x_integers - zero, w_integers) * (x_scale * w_scale.reshape(across))
    return (0.5 if name == "gemm" else 1.0) * product + b.reshape(across)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("limits", [Range(-0.3, 2.9), Range(0.0, 2.0), Range(-1.5, 0.0), Range(-2.0, 2.0)])
def test_layers_compute_integers_around_a_zero_point(name: str, limits: Range):
    model = make_layer(name)
    x = np.random.default_rng(73).normal(0.4, 2, size=LAYERS[name][1]).astype(np.float32)
    assert (x < limits.low).any()
    assert (x > limits.high).any()
    expected = reference(name, model, x, limits)
    quantise_everything(model, make_table(model, {"x": limits}), rule=ASYMMETRIC)
    (found,) = run_model(model, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("limits", [Range(-0.28, 3.0), Range(0.0, 2.0), Range(-1.5, 0.0)])
@pytest.mark.parametrize("name", LAYERS)
def test_backends_agree_on_zero_points(name: str, limits: Range, backend: str, tmp_path: Path):
    model = make_layer(name)
    random = np.random.default_rng(79)
    step = float(scale_from_range(np.array(limits.high - limits.low), 255))
    lowest = round(limits.low / step)
    # Values clear of the middle between two integers, and some beyond both ends.
    shape = LAYERS[name][1]
    x = (step * (random.integers(lowest - 9, lowest + 264, shape) + random.uniform(-0.4, 0.4, shape))).astype(
        np.float32
    )
    quantise_everything(model, make_table(model, {"x": limits}), rule=EXACT_HERE)
    (expected,) = run_model(model, {"x": x})
    found = session_outputs(model, backend, {"x": x}, tmp_path)["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("method", METHODS)
def test_backends_agree_on_a_network(method: str, backend: str, tmp_path: Path):
    model, feeds = make_fused_denoiser(), make_feeds()
    (exact,) = run_model(model, feeds)
    InsertQdq(measure_table(model, feeds), rule=replace(EXACT_HERE, method=method)).run(model)
    (expected,) = run_model(model, feeds)
    found = session_outputs(model, backend, feeds, tmp_path)["out_sample"]
    damage = np.abs(expected - exact).max()
    assert 0 < damage < 0.1 * np.abs(exact).max()
    # Roundings in front of a Q may turn single integers, by far less than quantisation itself changes.
    assert np.abs(found - expected).max() < 0.3 * damage


def test_zero_stays_zero():
    for limits in (Range(-0.28, 3.0), Range(0.0, 7.0), Range(-5.0, 0.0), Range(-1e-3, 1e4), Range(0.0, 0.0)):
        scale, zero = affine_from_range(limits, symmetric=False)
        assert -128 <= zero <= 127
        assert (zero - zero) * scale == 0
        assert (127 - zero) * scale >= limits.high - scale / 2
        assert (-128 - zero) * scale <= limits.low + scale / 2
    assert affine_from_range(Range(-1.0, 3.0), symmetric=True) == (scale_from_range(np.array(3.0), 127), 0)


def test_one_sided_values_get_twice_the_integers():
    model = make_layer("matmul")
    x = np.random.default_rng(83).uniform(0, 3, size=LAYERS["matmul"][1]).astype(np.float32)
    (exact,) = run_model(model, {"x": x})
    damage = {}
    for symmetric in (True, False):
        quantised = make_layer("matmul")
        table = make_table(quantised, {"x": (0.0, 3.0)})
        quantise_everything(quantised, table, rule=RangeRule(symmetric=symmetric))
        weights = quantised.graph.initializers["w.int8"].const_value.numpy()
        assert np.abs(weights).max() == 127
        (found,) = run_model(quantised, {"x": x})
        damage[symmetric] = np.sqrt(np.mean(np.square(found - exact)))
    assert damage[False] < damage[True]


def test_stored_ranges_go_before_the_statistics():
    text = '<ir_version: 10, opset_import: ["": 23]> g (float[5, 7] x) => (float[5, 2] y) { y = MatMul (x, w) }'
    model = make_model(text, {"w": np.ones((7, 2), np.float32)})
    table = make_table(model, {"x": 2.0}).with_ranges([RangeRule("max")])
    assert table.ranges == {"max, symmetric": {"x": (-2.0, 2.0)}}
    edited = type(table).from_json(table.to_json() | {"ranges": {"max, symmetric": {"x": [-1.0, 1.0]}}})
    quantise_everything(model, edited, rule=RangeRule("max"))
    (found,) = run_model(model, {"x": np.full((5, 7), 1.9, np.float32)})
    np.testing.assert_allclose(found, 7, rtol=0.02)


def test_ranges_without_zero_are_refused():
    model = make_layer("matmul")
    table = make_table(model, {"x": 2.0}).to_json() | {"ranges": {"max, symmetric": {"x": [1.0, 2.0]}}}
    with pytest.raises(PassError, match=r"range of tensor 'x' is 1\.0 to 2\.0"):
        quantise_everything(model, type(make_table(model, {})).from_json(table))
