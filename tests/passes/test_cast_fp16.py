from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from equality import apply_proven, make_model, operators, relative_error, run_model
from small_graphs import feed_attention, feed_resnet, make_attention, make_resnet, normal

from sdc.engines.errors import PassError
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes
from sdc.passes.precision.cast_fp16 import CastFp16
from sdc.passes.precision.half_tensors import half_from_tensor
from sdc.passes.simplify.remove_unused import RemoveUnused

FP16 = 4e-3
"""A handful of operators in a row, each of which rounds to 2^-11."""

SINUSOID = """
<ir_version: 10, opset_import: ["": 23]>
embedding (float[1] timestep) => (float[1, 9] y) <int64[1] one = {1}>
{
    column = Unsqueeze (timestep, one)
    angles = Mul (column, frequencies)
    waves = Sin (angles)
    y = MatMul (waves, weight)
}
"""
SINUSOID_WEIGHTS = {
    "frequencies": np.exp(-np.linspace(0, 6, 15, dtype=np.float32))[None],
    "weight": normal(1, 15, 9),
}


def halve(model: ir.Model) -> dict[str, object]:
    report = CastFp16().run(model)
    RemoveUnused().run(model)
    assert report.details is not None
    return report.details


@pytest.mark.parametrize("fused", [True, False])
def test_everything_inside_is_half_and_the_border_is_not(fused: bool) -> None:
    model, feeds = make_resnet(), feed_resnet()
    expected = run_model(model, feeds)
    for each in (*canonical_passes(), *(fusion_passes() if fused else ())):
        each.run(model)
    details = halve(model)
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.FLOAT}
    assert {value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT16, ir.DataType.INT64}
    inner = {output.dtype for node in model.graph if node.op_type != "Cast" for output in node.outputs}
    assert inner == {ir.DataType.FLOAT16}
    assert operators(model).count("Cast") == details["casts"] == 3
    assert 0 < relative_error(model, expected, feeds) < FP16
    for each in lowering_passes("openvino"):
        each.run(model)
    assert 0 < relative_error(model, expected, feeds) < FP16


def test_attention_in_half() -> None:
    model, feeds = make_attention(), feed_attention()
    expected = run_model(model, feeds)
    for each in fusion_passes():
        each.run(model)
    halve(model)
    assert 0 < relative_error(model, expected, feeds) < FP16


def test_second_run_changes_nothing() -> None:
    model = make_resnet()
    halve(model)
    before = operators(model)
    assert CastFp16().run(model).matched == 0
    assert operators(model) == before


def test_sinusoid_stays_in_float32() -> None:
    feeds = {"timestep": np.array([987.0], np.float32)}
    model = make_model(SINUSOID, SINUSOID_WEIGHTS)
    expected = run_model(model, feeds)
    details = halve(model)
    assert details["float32_nodes"] == 3
    assert operators(model) == ["Unsqueeze", "Mul", "Sin", "Cast", "MatMul", "Cast"]
    assert relative_error(model, expected, feeds) < FP16
    # The control: without its island the sinusoid of a late timestep is off by far more than rounding.
    broken = make_model(SINUSOID, SINUSOID_WEIGHTS)
    replace(CastFp16(), islands=frozenset()).run(broken)
    assert relative_error(broken, expected, feeds) > 5 * FP16


def test_weight_that_island_and_others_read_exists_in_both_types() -> None:
    text = SINUSOID.replace(
        "y = MatMul (waves, weight)", "scaled = Mul (waves, frequencies)  y = MatMul (scaled, weight)"
    )
    model = make_model(text, SINUSOID_WEIGHTS)
    halve(model)
    types = sorted(str(value.dtype) for value in model.graph.initializers.values() if value.shape == (1, 15))
    assert types == ["FLOAT", "FLOAT16"]
    assert len({value.name for value in model.graph.initializers.values()}) == len(model.graph.initializers)


def test_operand_that_must_be_float32_stays() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[B, 3, 5, 7] x) => (float[B, 3, 10, 14] y)
        <float[4] scales = {1.0, 1.0, 2.0, 2.0}> { y = Resize <mode = "nearest"> (x, , scales) }"""
    model, feeds = make_model(text, {}), {"x": normal(3, 2, 3, 5, 7)}
    expected = run_model(model, feeds)
    halve(model)
    assert model.graph.initializers["scales"].dtype == ir.DataType.FLOAT
    assert relative_error(model, expected, feeds) < FP16


def test_types_in_attributes_follow() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (int64[B, 3] ids, float[B, 3] x) => (float[B, 3] y)
        { real = Cast <to = 1> (ids)  size = Shape (x)  filled = ConstantOfShape <value = float[1] {0.3}> (size)
          half = Mul (real, filled)  y = Add (half, x) }"""
    model = make_model(text, {})
    feeds = {"ids": np.array([[3, -5, 7]]), "x": normal(4, 1, 3)}
    expected = run_model(model, feeds)
    halve(model)
    assert operators(model).count("Cast") == 3
    assert 0 < relative_error(model, expected, feeds) < FP16


def test_beyond_the_range_is_clamped_and_counted() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[B, 5] x) => (float[B, 5] y) { y = Add (x, mask) }"""
    mask = np.array([0.5, -3.4e38, 70000.0, 1e-9, -np.inf], np.float32)
    model = make_model(text, {"mask": mask})
    details = halve(model)
    assert (details["clamped"], details["underflowed"]) == (2, 1)
    (half,) = model.graph.initializers.values()
    assert half.const_value is not None
    assert half.const_value.numpy().tolist() == [0.5, -65504.0, 65504.0, 0.0, -np.inf]


def test_large_weights_are_converted_when_they_are_read() -> None:
    source = ir.tensor(normal(5, 73, 91) * 70000)
    half = half_from_tensor(source)
    assert isinstance(half.tensor, ir.LazyTensor)
    assert half.clamped == np.count_nonzero(np.abs(source.numpy()) > 65504)
    np.testing.assert_array_equal(half.tensor.numpy(), source.numpy().clip(-65504, 65504).astype(np.float16))


def test_quantised_operands_keep_their_integers() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[B, 5] x) => (float[B, 3] y)
        <float scale = {0.03125}, int8 zero = {0}, float[3] scales = {0.25, 0.5, 0.125}, int8[3] zeros = {0, 0, 0}>
        { q = QuantizeLinear (x, scale, zero)  d = DequantizeLinear (q, scale, zero)
          w = DequantizeLinear <axis = 1> (weight, scales, zeros)  y = MatMul (d, w) }"""
    weight = np.random.default_rng(6).integers(-127, 128, (5, 3)).astype(np.int8)
    # Values that float16 holds exactly: the integers must be the very same.
    model, feeds = make_model(text, {"weight": weight}), {"x": np.rint(40 * normal(7, 11, 5)) / 64}
    expected = run_model(model, feeds)
    halve(model)
    assert model.graph.initializers["weight"].dtype == ir.DataType.INT8
    assert relative_error(model, expected, feeds) < FP16


def test_function_of_unknown_types_is_refused() -> None:
    model = make_resnet()
    for each in (*canonical_passes(), *fusion_passes()):
        each.run(model)
    (identifier, function) = next(iter(model.functions.items()))
    model.functions[("other", *identifier[1:])] = function
    function.domain = "other"
    with pytest.raises(PassError, match="bodies of unknown types"):
        CastFp16().run(model)


def test_subgraph_is_refused() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (bool c, float[3] x) => (float[3] y)
        { y = If (c) <then_branch = a () => (float[3] t) { t = Neg (x) },
                      else_branch = b () => (float[3] e) { e = Abs (x) }> }"""
    with pytest.raises(PassError, match="subgraph"):
        CastFp16().run(make_model(text, {}))


def test_half_model_passes_the_checks_of_every_pass() -> None:
    model, feeds = make_resnet(), feed_resnet()
    apply_proven((*canonical_passes(), *fusion_passes(), CastFp16(), RemoveUnused()), model, [feeds], tolerance=FP16)
