"""Float32 arithmetic on weights that are stored in float16."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from equality import apply_proven, make_model, operators, relative_error, run_model
from small_graphs import RESNET, feed_attention, feed_resnet, make_attention, make_resnet, normal

from sdc.engines.errors import PassError
from sdc.passes.base import run_passes
from sdc.passes.lowering.widen_fp16 import WidenFp16
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes
from sdc.passes.precision.cast_fp16 import CastFp16
from sdc.passes.simplify.cancel_no_ops import CancelNoOps

HALF = ir.DataType.FLOAT16
ROUNDED = 5e-3
"""What float16 may be off."""

MATMUL = """<ir_version: 10, opset_import: ["": 23]> g (float[5, 128] x) => (float[5, 96] y) {
    p = MatMul (x, w) y = Add (p, b) }"""
HALVES = """<ir_version: 10, opset_import: ["": 23]> g (float16[5, 128] x) => (float16[5, 96] y, float16[5, 96] z) {
    y = MatMul (x, w) z = Relu (y) }"""
TYPED = """<ir_version: 10, opset_import: ["": 23]> g (float[3, 4] x) => (float[3, 4] y)
    <int8 zero = {3}> {
        h = Cast <to = 10> (x)
        q = QuantizeLinear (h, scale, zero)
        d = DequantizeLinear <output_dtype = 10> (q, scale, zero)
        s = Shape (d)
        f = ConstantOfShape <value = float16[1] {15872}> (s)
        t = Add (d, f)
        y = Cast <to = 1> (t) }"""


def make_half_matmul() -> ir.Model:
    """A large weight and a small bias."""
    model = make_model(MATMUL, {"w": normal(0, 128, 96), "b": normal(1, 96)})
    run_passes([CastFp16()], model)
    return model


FEEDS = [{"x": normal(2, 5, 128)}]


def halves(model: ir.Model) -> list[str]:
    """Operators that write float16."""
    return [node.op_type for node in model.graph for value in node.outputs if value.dtype == HALF]


def test_large_weights_stay_and_small_ones_are_what_they_were() -> None:
    model = make_half_matmul()
    (report, _) = apply_proven([WidenFp16(), CancelNoOps()], model, FEEDS, tolerance=ROUNDED)
    assert (report.matched, dict(report.details)) == (3, {"stored": 1, "constants": 1})
    assert operators(model) == ["Cast", "MatMul", "Add"]
    stored = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert stored == {"w.float16": HALF, "b.float16": ir.DataType.FLOAT}
    bias = model.graph.initializers["b.float16"].const_value
    assert bias is not None
    np.testing.assert_array_equal(bias.numpy(), normal(1, 96))


def test_results_are_those_of_float32_with_rounded_weights() -> None:
    weight = normal(0, 128, 96).astype(np.float16).astype(np.float32)
    wanted = run_model(make_model(MATMUL, {"w": weight, "b": normal(1, 96)}), FEEDS[0])
    model = make_half_matmul()
    run_passes([WidenFp16(), CancelNoOps()], model)
    assert relative_error(model, wanted, FEEDS[0]) == 0


def test_a_weight_is_cast_once_for_all_that_read_it() -> None:
    text = MATMUL.replace("p = MatMul (x, w)", "t = Tanh (w) a = MatMul (x, w) c = MatMul (x, t) p = Add (a, c)")
    model = make_model(text, {"w": normal(0, 128, 96), "b": normal(1, 96)})
    run_passes([CastFp16(), WidenFp16(), CancelNoOps()], model)
    assert operators(model).count("Cast") == 1


def test_rows_of_a_table_are_cast_when_they_are_picked() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (int64[5] i) => (float[5, 96] y, float[5, 128] z) {
        r = Gather (t, i) y = Neg (r) u = Transpose (t) z = MatMul (y, u) }"""
    model = make_model(text, {"t": normal(0, 128, 96)})
    feeds = [{"i": np.array([3, 0, 127, 3, 64])}]
    run_passes([CastFp16()], model)
    apply_proven([WidenFp16(), CancelNoOps()], model, feeds, tolerance=ROUNDED)
    assert operators(model) == ["Cast", "Gather", "Cast", "Neg", "Transpose", "MatMul"]
    assert halves(model) == ["Gather"]


def test_inputs_and_outputs_keep_their_type() -> None:
    model = make_model(HALVES, {"w": normal(0, 128, 96).astype(np.float16)})
    feeds = [{"x": normal(2, 5, 128).astype(np.float16)}]
    apply_proven([WidenFp16()], model, feeds, tolerance=ROUNDED)
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [("y", HALF), ("z", HALF)]
    assert halves(model) == ["Cast", "Cast"], "for the outputs"


def test_an_output_that_is_read_inside_too() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[5, 128] x) => (float16[5, 128] h, float16[5, 96] y) {
        h = Cast <to = 10> (x) n = Neg (h) y = MatMul (n, w) }"""
    model = make_model(text, {"w": normal(0, 128, 96).astype(np.float16)})
    apply_proven([WidenFp16()], model, FEEDS, tolerance=ROUNDED)
    assert [value.dtype for value in model.graph.outputs] == [HALF, HALF]


def test_a_constant_that_is_an_output_keeps_its_type() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (float16[3] x) => (float16[3] y, float16[3] c) {
        y = Add (x, c) }"""
    model = make_model(text, {"c": normal(0, 3).astype(np.float16)})
    apply_proven([WidenFp16()], model, [{"x": normal(2, 3).astype(np.float16)}], tolerance=ROUNDED)
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [("y", HALF), ("c", HALF)]


def test_operators_that_name_their_type_name_float32() -> None:
    model = make_model(TYPED, {"scale": np.array(0.25, np.float16)})
    (report, _) = run_passes([WidenFp16(), CancelNoOps()], model)
    assert report.matched == 4
    assert halves(model) == []
    x = 4 * normal(3, 3, 4)
    wanted = (np.clip(np.round(x / 0.25) + 3, -128, 127) - 3) * 0.25 + 1.5
    np.testing.assert_allclose(run_model(model, {"x": x})["y"], wanted, atol=1e-6)
    assert {value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT, ir.DataType.INT8}


def test_scales_are_float32_however_many() -> None:
    scales = np.abs(normal(4, 3, 4000)).astype(np.float16) + np.float16(0.1)
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[5, 96] x) => (float[5, 4000] y) {
        d = DequantizeLinear <axis = 0, block_size = 32> (q, scale) h = Cast <to = 10> (x) p = MatMul (h, d)
        y = Cast <to = 1> (p) }"""
    integers = np.random.default_rng(0).integers(-100, 100, (96, 4000)).astype(np.int8)
    model = make_model(text, {"q": integers, "scale": scales})
    apply_proven([WidenFp16(), CancelNoOps()], model, [{"x": normal(5, 5, 96)}], tolerance=ROUNDED)
    assert operators(model) == ["DequantizeLinear", "MatMul"]
    assert model.graph.initializers["scale"].dtype == ir.DataType.FLOAT


def test_nothing_happens_in_float32() -> None:
    model = make_resnet()
    before = operators(model)
    assert WidenFp16().run(model).matched == 0
    assert operators(model) == before


def test_what_has_subgraphs_is_refused() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (bool c, float16[3] x) => (float16[3] y) {
        y = If <then_branch = t () => (float16[3] a) { a = Neg (x) },
                else_branch = e () => (float16[3] b) { b = Abs (x) }> (c) }"""
    with pytest.raises(PassError, match=r"widen-fp16: .* holds a subgraph"):
        WidenFp16().run(make_model(text, {}))


@pytest.mark.parametrize("network", ["resnet", "attention"])
def test_onnxruntime_runs_the_kernels_that_it_runs_in_float32(network: str, tmp_path: Path) -> None:
    """With all of its own optimisations; before, group norms alone were fifteen kernels each, and casts around all."""
    kinds, results = {}, {}
    feeds = feed_resnet() if network == "resnet" else feed_attention()
    for precision in ("float32", "float16"):
        model = make_resnet(RESNET) if network == "resnet" else make_attention()
        run_passes([*canonical_passes(), *fusion_passes()], model)
        run_passes([CastFp16()] if precision == "float16" else [], model)
        run_passes(lowering_passes("onnxruntime"), model)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{precision}.onnx")
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        kinds[precision] = collections.Counter(node.op_type for node in ir.load(tmp_path / f"{precision}.onnx").graph)
        results[precision] = session.run(None, feeds)[0]
    assert kinds["float16"] == kinds["float32"]
    largest = np.abs(results["float32"]).max()
    np.testing.assert_allclose(results["float16"], results["float32"], atol=ROUNDED * largest)
