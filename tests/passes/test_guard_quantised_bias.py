"""Residual sums behind quantised convolutions, in OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import make_model, make_table, quantise_everything, run_model

from sdc.engines.processor import exact_weight_bits
from sdc.engines.sessions.openvino_core import openvino_core
from sdc.passes.lowering.guard_quantised_bias import GuardQuantisedBias
from sdc.passes.precision.range_rules import RangeRule

BLOCK = """<ir_version: 10, opset_import: ["": 23]> g (float[B, 6, H, W] x) => (float[B, 9, H, W] y) {{
    a = Conv <pads = [1, 1, 1, 1]> (x, w_1{bias})
    b = Sigmoid (a)
    c = Conv (b, w_2)
    y = Add (c, a) }}"""


def make_block(bias: float | None) -> ir.Model:
    """A quantised block; `bias` fills the first convolution's, or is left out."""
    random = np.random.default_rng(67)
    weights = {
        "w_1": random.normal(size=(9, 6, 3, 3)).astype(np.float32) / 7,
        "w_2": random.normal(size=(9, 9, 1, 1)).astype(np.float32) / 3,
    }
    if bias is not None:
        weights["b_1"] = np.full(9, bias, np.float32)
    model = make_model(BLOCK.format(bias="" if bias is None else ", b_1"), weights)
    rule = RangeRule(weight_bits=exact_weight_bits())
    quantise_everything(model, make_table(model, {"x": 3.0, "b": 1.0}), rule=rule)
    return model


def make_input() -> np.ndarray:
    return np.random.default_rng(71).uniform(-3, 3, (2, 6, 5, 7)).astype(np.float32)


def run_openvino(model: ir.Model, folder: Path) -> np.ndarray:
    ir.save(model, folder / "model.onnx")
    core = openvino_core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(folder / "model.onnx"), "CPU", options)
    return np.array(compiled.create_infer_request().infer({"x": make_input()})["y"])


@pytest.mark.parametrize("bias", [None, 0.0])
def test_residual_sum_is_right_in_openvino(bias: float | None, tmp_path: Path):
    model = make_block(bias)
    (expected,) = run_model(model, {"x": make_input()})
    # If this is right without the pass, OpenVINO has mended it and the pass can go.
    assert np.abs(run_openvino(model, tmp_path) - expected).max() > 0.3 * np.abs(expected).max()
    assert GuardQuantisedBias().run(model).matched == 2
    np.testing.assert_array_equal(run_model(model, {"x": make_input()})[0], expected)
    # Single integers of `b` may turn by one step of 1/127.
    assert np.abs(run_openvino(model, tmp_path) - expected).max() < 0.02 * np.abs(expected).max()
    assert GuardQuantisedBias().run(model).matched == 0


def test_other_biases_are_left():
    model = make_block(0.25)
    report = GuardQuantisedBias().run(model)
    assert report.matched == 1
    first, second = (node for node in model.graph if node.op_type == "Conv")
    assert first.inputs[2].name == "b_1"
    assert second.inputs[2].const_value.numpy().tolist() == [np.finfo(np.float32).tiny] * 9


def test_convolutions_in_floating_point_are_left():
    weights = {"w_1": np.ones((9, 6, 3, 3), np.float32), "w_2": np.ones((9, 9, 1, 1), np.float32)}
    assert GuardQuantisedBias().run(make_model(BLOCK.format(bias=""), weights)).matched == 0


def test_float16():
    text = BLOCK.format(bias="").replace("float[", "float16[")
    random = np.random.default_rng(73)
    weights = {"w_1": random.normal(size=(9, 6, 3, 3)), "w_2": random.normal(size=(9, 9, 1, 1))}
    model = make_model(text, {name: weight.astype(np.float16) for name, weight in weights.items()})
    quantise_everything(model, make_table(model, {"x": 3.0, "b": 1.0}))
    assert GuardQuantisedBias().run(model).matched == 2
    biases = [node.inputs[2].const_value.numpy() for node in model.graph if node.op_type == "Conv"]
    assert {(bias.dtype, float(bias.max())) for bias in biases} == {(np.dtype(np.float16), 2.0**-24)}
