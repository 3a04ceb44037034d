"""Unsigned activations: the same numbers, and a graph that ONNX Runtime can optimise."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
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

from sdc.passes.lowering.shift_qdq_to_uint8 import ShiftQdqToUint8
from sdc.passes.precision.insert_qdq import InsertQdq

PAIR = """<ir_version: 10, opset_import: ["": 23]> g (float[5, 7] x) => (float[5, 7] y)
    <float scale = {{0.25}}, int8 zero = {{{zero}}}> {{
        q = QuantizeLinear (x, scale, zero) y = DequantizeLinear (q, scale, zero) }}"""


def test_network_gives_the_same_bytes():
    model, feeds = make_fused_denoiser(), make_feeds()
    InsertQdq(measure_table(model, feeds)).run(model)
    (before,) = run_model(model, feeds)
    report = ShiftQdqToUint8().run(model)
    assert (report.matched, report.nodes_after) == (6, report.nodes_before)
    quantised = {node.outputs[0].dtype for node in model.graph if node.op_type == "QuantizeLinear"}
    assert quantised == {ir.DataType.UINT8}
    np.testing.assert_array_equal(run_model(model, feeds)[0], before)
    weights = [value for name, value in model.graph.initializers.items() if name.endswith(".int8")]
    assert {value.dtype for value in weights} == {ir.DataType.INT8}
    assert ShiftQdqToUint8().run(model).matched == 0


def test_saturation_is_the_same():
    x = (np.arange(35, dtype=np.float32) - 17).reshape(5, 7) * 3
    model = make_model(PAIR.format(zero=0), {})
    (before,) = run_model(model, {"x": x})
    assert before.min() == -32
    assert before.max() == 127 / 4
    assert ShiftQdqToUint8().run(model).matched == 1
    np.testing.assert_array_equal(run_model(model, {"x": x})[0], before)


@pytest.mark.parametrize("zero", [3, -128, 127])
def test_zero_points_move_along(zero: int):
    x = (np.arange(35, dtype=np.float32) - 17).reshape(5, 7) * 3
    model = make_model(PAIR.format(zero=zero), {})
    (before,) = run_model(model, {"x": x})
    assert ShiftQdqToUint8().run(model).matched == 1
    assert model.graph[0].inputs[2].const_value.numpy() == zero + 128
    np.testing.assert_array_equal(run_model(model, {"x": x})[0], before)


def test_zero_points_of_channels_move_along():
    text = PAIR.format(zero=0).replace("float scale = {0.25}", "float[7] scale = {1, 2, 3, 4, 5, 6, 7}")
    model = make_model(text.replace("int8 zero = {0}", "int8[7] zero = {0, 127, -128, 5, 0, 0, 1}"), {})
    x = (np.arange(35, dtype=np.float32) - 17).reshape(5, 7) * 30
    (before,) = run_model(model, {"x": x})
    assert ShiftQdqToUint8().run(model).matched == 1
    assert model.graph[0].inputs[2].const_value.numpy().tolist() == [128, 255, 0, 133, 128, 128, 129]
    np.testing.assert_array_equal(run_model(model, {"x": x})[0], before)


def test_a_zero_point_that_is_computed_is_left():
    text = PAIR.format(zero=0).replace("int8 zero", "int8 none").replace("q = Q", "zero = Identity (none) q = Q")
    report = ShiftQdqToUint8().run(make_model(text, {}))
    assert report.matched == 0
    assert "not an int8 constant" in report.skipped[0].reason


def test_integers_with_other_readers_are_left():
    text = PAIR.format(zero=0).replace("(float[5, 7] y)", "(float[5, 7] y, float[5, 7] z)")
    model = make_model(text.replace(" }", " z = Cast <to = 1> (q) }"), {})
    report = ShiftQdqToUint8().run(model)
    assert report.matched == 0
    assert "expected DequantizeLinear" in report.skipped[0].reason


def test_onnxruntime_optimises_a_biased_layer():
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[2, 5, 7] x) => (float[2, 5, 11] y)
        { m = MatMul (x, w) y = Add (m, b) }"""
    random = np.random.default_rng(53)
    weights = {"w": random.normal(size=(7, 11)).astype(np.float32), "b": random.normal(size=11).astype(np.float32)}
    model = make_model(text, weights)
    quantise_everything(model, make_table(model, {"x": 3.0}))

    def load() -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        proto = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])

    # If this no longer fails, ONNX Runtime has mended it and the pass has only its speed to say for itself.
    with pytest.raises(Exception, match="output_dtype INT8"):
        load()
    ShiftQdqToUint8().run(model)
    x = random.normal(size=(2, 5, 7)).astype(np.float32)
    (expected,) = run_model(model, {"x": x})
    np.testing.assert_allclose(load().run(None, {"x": x})[0], expected, atol=1e-6)
