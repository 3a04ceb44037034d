"""What is known of sizes is folded when a model is written, and nothing that is computed in floating point."""

from collections import Counter

import numpy as np
import onnx.parser
import openvino
import pytest
from openvino import opset13 as operators

from sdc.compiler.build.fold_sizes import fold_sizes
from sdc.engines.sessions.openvino_core import openvino_core

QUANTISED = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[B,3,H,W] sample) => (float[B,5,P,Q] out_sample)
<float scale = {0.1}, int8 zero = {3}, int8[5,3,1,1] weight = {1,-2,3,-4,5,-6,7,-8,9,-10,11,-12,13,-14,15},
 float[5] scales = {0.5, 0.25, 0.1, 0.7, 0.3}, int8[5] zeros = {0,0,0,0,0}, float[5] bias = {1,2,3,4,5},
 float[5] gain = {1.1,1.2,1.3,1.4,1.5}> {
    integers = QuantizeLinear (sample, scale, zero)
    rounded = DequantizeLinear (integers, scale, zero)
    floats = DequantizeLinear <axis = 0> (weight, scales, zeros)
    convolved = Conv (rounded, floats, bias)
    last = Transpose <perm = [0, 2, 3, 1]> (convolved)
    normed = LayerNormalization <axis = -1> (last, gain)
    out_sample = Transpose <perm = [0, 3, 1, 2]> (normed)
}
"""


@pytest.fixture
def quantised(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.parser.parse_model(QUANTISED).SerializeToString())
    return openvino_core().read_model(path)


def kinds(model):
    return Counter(node.get_type_name() for node in model.get_ops())


def run(model, sample):
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(sample)[0]


def test_shapes_of_weights_and_ranks_are_folded_and_the_result_is_the_same(quantised):
    sample = np.random.default_rng(0).standard_normal((2, 3, 7, 5), dtype=np.float32)
    wanted, before = run(quantised, sample), kinds(quantised)
    assert before["ShapeOf"] >= 3  # else the frontend has changed, and there is nothing to fold any more
    assert fold_sizes(quantised) >= before["ShapeOf"]
    after = kinds(quantised)
    assert after["ShapeOf"] == after["Range"] == after["Broadcast"] == 0
    assert after["Convert"] == before["Convert"]  # the integers of weights stay integers
    assert np.array_equal(run(quantised, sample), wanted)


def test_a_second_time_nothing_is_left(quantised):
    fold_sizes(quantised)
    operators_left = len(quantised.get_ops())
    assert fold_sizes(quantised) == 0
    assert len(quantised.get_ops()) == operators_left


def test_arithmetic_in_floating_point_stays():
    sample = operators.parameter([2, 3], np.float32, name="sample")
    total = operators.add(operators.constant(np.float16([1, 2, 3])), operators.constant(np.float16([4, 5, 6])))
    model = openvino.Model([operators.add(sample, operators.convert(total, "f32"))], [sample])
    assert fold_sizes(model) == 0


def test_a_shape_that_is_free_stays():
    sample = operators.parameter([-1, 3], np.float32, name="sample")
    model = openvino.Model([operators.shape_of(sample)], [sample])
    assert fold_sizes(model) == 0


@pytest.mark.parametrize("stored", [openvino.Type.f16, openvino.Type.bf16, openvino.Type.i8])
def test_constants_are_reshaped_byte_by_byte(stored):
    constant = operators.constant(np.float32([1.5, -2, 3, 70, 5, 6]), stored)
    expected = np.array(constant.data).tobytes()
    reshaped = operators.reshape(constant, operators.constant(np.int64([2, -1])), special_zero=False)
    reshaped.set_friendly_name("scales")
    sample = operators.parameter([2, 3], stored, name="sample")
    model = openvino.Model([operators.multiply(sample, reshaped)], [sample])
    assert fold_sizes(model) == 1
    (found,) = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    assert found.get_friendly_name() == "scales"
    assert (found.get_output_element_type(0), list(found.get_output_shape(0))) == (stored, [2, 3])
    assert np.array(found.data).tobytes() == expected
