"""What Q/DQ pairs compute, against integers in NumPy, and where they are put."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import (
    SPEC,
    make_denoiser,
    make_feeds,
    make_fused_denoiser,
    make_model,
    make_table,
    measure_table,
    quantise_everything,
    run_model,
)

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.engines.errors import InputError, PassError
from sdc.engines.processor import exact_weight_bits
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import ComponentSpec, TensorSpec
from sdc.engines.targets import TARGETS
from sdc.passes.base import run_passes
from sdc.passes.lowering.guard_quantised_bias import GuardQuantisedBias
from sdc.passes.lowering.shift_qdq_to_uint8 import ShiftQdqToUint8
from sdc.passes.pipeline import lowering_passes, precision_passes
from sdc.passes.precision.formats import Format
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.layer_roles import Role
from sdc.passes.precision.plan import uniform_plan
from sdc.passes.precision.range_rules import RangeRule
from sdc.passes.precision.scales import scale_from_range
from sdc.passes.precision.weight_qdq import quantise_weights

CONV = "y = Conv <pads = [1, 0, 1, 0], strides = [2, 1]> (x, w, b)"
MATMUL = "m = MatMul (x, w) y = Add (m, b)"
GEMM = "y = Gemm <alpha = 0.5> (x, w, b)"
GEMM_TRANSPOSED = "y = Gemm <transB = 1> (x, w, b)"

LAYERS = {
    "conv": (CONV, (2, 3, 5, 7), (11, 3, 3, 1), 0),
    "matmul": (MATMUL, (2, 5, 7), (7, 11), 1),
    "matmul-square": (MATMUL, (2, 5, 7), (7, 7), 1),
    "gemm": (GEMM, (5, 7), (7, 11), 1),
    "gemm-transposed": (GEMM_TRANSPOSED, (5, 7), (11, 7), 0),
}
"""Body, shapes of x and w, and the axis of output channels."""


def make_layer(name: str) -> ir.Model:
    body, x_shape, w_shape, axis = LAYERS[name]
    random = np.random.default_rng(29)
    # Channels of very different magnitude: one scale for all of them would be seen.
    sizes = np.logspace(-2, 1, w_shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(w_shape))])
    weights = {
        "w": (random.normal(size=w_shape) * sizes).astype(np.float32),
        "b": random.normal(size=w_shape[axis]).astype(np.float32),
    }
    dimensions = ", ".join(map(str, x_shape))
    text = f'<ir_version: 10, opset_import: ["": 23]> g (float[{dimensions}] x) => (float[A, B] y) {{ {body} }}'
    return make_model(text, weights)


def multiply(name: str, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The layer's bare product, in the type of its operands."""
    if name != "conv":
        return x @ (w.T if name == "gemm-transposed" else w)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    rows = [padded[:, :, top : top + 3, :] for top in range(0, 5, 2)]
    return np.stack([np.einsum("ncaw,oca->now", row, w[..., 0]) for row in rows], axis=2)


def reference(name: str, model: ir.Model, x: np.ndarray, limit: float, *, levels: int, per_channel: bool) -> np.ndarray:
    """Integer arithmetic throughout: quantise, saturate, multiply in int64, scale once, add the bias."""
    axis = LAYERS[name][3]
    w, b = (model.graph.initializers[key].const_value.numpy().astype(np.float64) for key in ("w", "b"))
    others = tuple(i for i in range(w.ndim) if i != axis)
    limits = np.abs(w).max(axis=others, keepdims=True) if per_channel else np.abs(w).max()
    w_scale, x_scale = (
        scale_from_range(limits, levels).astype(np.float64),
        float(scale_from_range(np.array(limit), 127)),
    )
    w_integers = np.round(w / w_scale).astype(np.int64)
    assert np.abs(w_integers).max() == levels
    x_integers = np.clip(np.round(x / np.float32(x_scale)), -128, 127).astype(np.int64)
    if per_channel:
        w_scale = w_scale.reshape(-1)
    across = (-1, 1, 1) if name == "conv" else (-1,)
    product = multiply(name, x_integers, w_integers) * (x_scale * np.broadcast_to(w_scale, b.shape).reshape(across))
    return (0.5 if name == "gemm" else 1.0) * product + b.reshape(across)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("bits", "per_channel"), [(8, True), (8, False), (4, True), (4, False)])
def test_layers_compute_integers(name: str, bits: int, per_channel: bool):
    model = make_layer(name)
    x = np.random.default_rng(31).normal(size=LAYERS[name][1]).astype(np.float32)
    limit = 0.5 * float(np.abs(x).max())  # so that values beyond it saturate
    expected = reference(name, model, x, limit, levels=2 ** (bits - 1) - 1, per_channel=per_channel)
    rule = RangeRule(weight_bits=bits)
    report = quantise_everything(model, make_table(model, {"x": limit}), rule=rule, per_channel=per_channel)
    assert report.matched == 1
    assert model.graph.initializers["w.int8"].dtype == ir.DataType.INT8
    (found,) = run_model(model, {"x": x})
    # The graph sums a few dozen products in float32: some roundings of 6e-8 of the largest sum.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def session_outputs(model: ir.Model, backend: str, feeds: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """What the runtime's own session gives, with all the optimisations of its backend."""
    spec = ComponentSpec(
        "unet",
        tuple(TensorSpec(name, array.dtype.name, array.shape) for name, array in feeds.items()),
        tuple(TensorSpec(value.name or "", "float32", ()) for value in model.graph.outputs),
        {},
    )
    target = next(target for target in TARGETS.values() if target.backend == backend)
    lowered = model.clone()
    mended = {"onnxruntime": ShiftQdqToUint8(), "openvino": GuardQuantisedBias()}
    run_passes([*lowering_passes(backend), mended[backend]], lowered)
    built = build_engine(Component(spec, lowered), target, folder)
    files = tuple(folder / file for file in built.files)
    # float32 around the integers, so that what differs is the integers' doing
    options = built.options | {"inference_precision": "f32"}
    with open_session(EngineSource(spec, backend, files, options), threads=1) as session:
        return session.run(feeds)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("name", LAYERS)
def test_backends_agree_with_the_graph(name: str, backend: str, tmp_path: Path):
    model = make_layer(name)
    random = np.random.default_rng(37)
    limit = 3.0
    step = float(scale_from_range(np.array(limit), 127))
    # Values clear of the middle between two integers: no backend's rounding can turn them.
    shape = LAYERS[name][1]
    x = (step * (random.integers(-120, 121, shape) + random.uniform(-0.4, 0.4, shape))).astype(np.float32)
    quantise_everything(model, make_table(model, {"x": limit}), rule=RangeRule(weight_bits=exact_weight_bits()))
    (expected,) = run_model(model, {"x": x})
    found = session_outputs(model, backend, {"x": x}, tmp_path)["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_backends_agree_on_a_network(backend: str, tmp_path: Path):
    model, feeds = make_fused_denoiser(), make_feeds()
    (exact,) = run_model(model, feeds)
    InsertQdq(measure_table(model, feeds), rule=RangeRule(weight_bits=exact_weight_bits())).run(model)
    (expected,) = run_model(model, feeds)
    found = session_outputs(model, backend, feeds, tmp_path)["out_sample"]
    damage = np.abs(expected - exact).max()
    assert 0 < damage < 0.05 * np.abs(exact).max()
    # Roundings in front of a Q may turn single integers, by far less than quantisation itself changes.
    assert np.abs(found - expected).max() < 0.3 * damage


def test_operators_of_the_denoiser():
    model = make_fused_denoiser()
    before = Counter(node.op_type for node in model.graph)
    report = InsertQdq(measure_table(model, make_feeds())).run(model)
    after = Counter(node.op_type for node in model.graph)
    # Seven layers, and the weights of two more; key and value read one tensor and share its pair.
    assert report.matched == 7
    assert after - before == Counter(QuantizeLinear=6, DequantizeLinear=15)
    assert not before - after
    assert report.details is not None
    assert (report.details["activations"], report.details["weights"], report.details["weights_only"]) == (6, 9, 2)
    assert len(report.skipped) == 4
    assert {value.dtype for name, value in model.graph.initializers.items() if name.startswith("b_")} == {
        ir.DataType.FLOAT
    }
    assert "w_interior_1" not in model.graph.initializers
    assert "w_shortcut" in model.graph.initializers


def test_weights_only_layers_keep_their_activations():
    model, feeds = make_denoiser(), make_feeds()
    table = measure_table(model, feeds)
    (exact,) = run_model(model, feeds)
    plan = uniform_plan(model, Format.INT8, kept=frozenset(Role) - {Role.INTERIOR})
    shortcuts = (replace(line, format=Format.W8) if line.role is Role.SHORTCUT else line for line in plan.layers)
    InsertQdq(table, replace(plan, layers=tuple(shortcuts))).run(model)
    layers = {node.name or node.outputs[0].name: node for node in model.graph if node.op_type in ("Gemm", "Conv")}
    producers = {name: [_operator(value) for value in layers[name].inputs[:2]] for name in ("time_1", "time_3", "skip")}
    assert producers["time_1"] == ["Expand", "DequantizeLinear"]
    assert producers["time_3"] == ["Sigmoid", "DequantizeLinear"]
    assert producers["skip"] == ["Conv", "DequantizeLinear"]
    integers = model.graph.initializers["w_time_1.int8"].const_value.numpy()
    assert integers.dtype == np.int8
    assert "w_time_1" not in model.graph.initializers
    (found,) = run_model(model, feeds)
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def _operator(value: ir.Value | None) -> str:
    node = None if value is None else value.producer()
    return "" if node is None else node.op_type


def test_other_readers_of_a_quantised_tensor_keep_the_original():
    text = """<ir_version: 10, opset_import: ["": 23]>
        g (float[5, 7] x) => (float[5, 11] y, float[5, 7] z, float[7, 11] u)
        { y = MatMul (x, w) z = Sigmoid (x) u = Neg (w) }"""
    weight = np.random.default_rng(41).normal(size=(7, 11)).astype(np.float32)
    model = make_model(text, {"w": weight})
    x = np.random.default_rng(43).normal(size=(5, 7)).astype(np.float32)
    _, z, u = run_model(model, {"x": x})
    quantise_everything(model, make_table(model, {"x": 2.0}))
    y, z_after, u_after = run_model(model, {"x": x})
    assert not np.array_equal(y, x @ weight)
    np.testing.assert_array_equal(z_after, z)
    np.testing.assert_array_equal(u_after, u)
    assert "w" in model.graph.initializers


def test_shared_weight_is_stored_once_for_each_axis():
    text = """<ir_version: 10, opset_import: ["": 23]>
        g (float[5, 7] x) => (float[5, 7] y, float[5, 7] z, float[5, 7] v)
        { y = MatMul (x, w) z = Gemm (x, w) v = Gemm <transB = 1> (x, w) }"""
    weight = np.random.default_rng(47).normal(size=(7, 7)).astype(np.float32)
    model = make_model(text, {"w": weight})
    report = quantise_everything(model, make_table(model, {"x": 4.0}))
    assert report.matched == 3
    stored = [
        value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8 and value.shape.rank()
    ]
    assert len(stored) == 2
    x = np.eye(5, 7, dtype=np.float32) * 4
    y, z, v = run_model(model, {"x": x})
    np.testing.assert_array_equal(y, z)
    half_step = np.abs(weight).max() / 127 / 2 * 1.01
    np.testing.assert_allclose(v / 4, weight.T[:5], atol=half_step)


def test_twice_is_once():
    model = make_fused_denoiser()
    table = measure_table(model, make_feeds())
    InsertQdq(table).run(model)
    (once,) = run_model(model, make_feeds())
    nodes = len(model.graph)
    report = InsertQdq(table).run(model)
    assert (report.matched, len(model.graph)) == (0, nodes)
    assert "before" in report.skipped[0].reason
    np.testing.assert_array_equal(run_model(model, make_feeds())[0], once)


def test_layers_that_are_quantised_already_are_left():
    model = make_denoiser()
    InsertQdq(measure_table(model, make_feeds())).run(model)
    del model.metadata_props["sdc.quantised_from"]
    everything = uniform_plan(model, Format.INT8, kept=frozenset())
    again = InsertQdq(measure_table(model, make_feeds()), everything).run(model)
    assert again.matched == 4
    assert sum("already quantised" in skipped.reason for skipped in again.skipped) == 9


def test_tables_of_other_graphs_are_refused():
    model = make_denoiser()
    table = measure_table(model, make_feeds())
    with pytest.raises(PassError, match="belongs to the graph"):
        InsertQdq(table).run(make_denoiser(seed=6))
    InsertQdq(table).run(model)
    with pytest.raises(PassError, match="belongs to the graph"):
        InsertQdq(measure_table(make_denoiser(seed=6), make_feeds())).run(model)


def test_zero_quantised_layers_is_an_error():
    model = make_denoiser()
    with pytest.raises(PassError, match="no layer was quantised, 13 stay"):
        InsertQdq(measure_table(model, make_feeds()), uniform_plan(model, Format.FP16)).run(model)


def test_missing_and_impossible_ranges_are_refused():
    model = make_layer("matmul")
    with pytest.raises(PassError, match="no range for tensor 'x'"):
        quantise_everything(model, make_table(model, {"other": 1.0}))
    with pytest.raises(PassError, match="range of tensor 'x' is nan"):
        quantise_everything(model, make_table(model, {"x": float("nan")}))


def test_weights_that_are_not_finite_are_refused():
    text = '<ir_version: 10, opset_import: ["": 23]> g (float[5, 3] x) => (float[5, 2] y) { y = MatMul (x, w) }'
    model = make_model(text, {"w": np.array([[1, 2], [np.inf, 3], [4, 5]], np.float32)})
    with pytest.raises(PassError, match="NaN or infinity"):
        quantise_everything(model, make_table(model, {"x": 1.0}))


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits: int):
    with pytest.raises(InputError, match=f"{bits} bits"):
        RangeRule(weight_bits=bits)


def test_zero_ranges_stay_zero():
    model = make_layer("matmul")
    weight = model.graph.initializers["w"]
    array = weight.const_value.numpy().copy()
    array[:, 4] = 0
    weight.const_value = ir.tensor(array, name="w")
    quantise_everything(model, make_table(model, {"x": 0.0}))
    (y,) = run_model(model, {"x": np.zeros((2, 5, 7), np.float32)})
    bias = model.graph.initializers["b"].const_value.numpy()
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))


def test_scales_are_float16_values_that_cover_their_range():
    limits = np.concatenate([np.logspace(-9, 6, 997), [0.0]]).astype(np.float32)
    scales = scale_from_range(limits, 127)
    np.testing.assert_array_equal(scales.astype(np.float16).astype(np.float32), scales)
    assert (scales * 127 >= limits).all()
    usual = limits > 127 * 2.0**-14  # float16's normal numbers
    assert (scales[usual] * 127 <= limits[usual] * (1 + 2.0**-10) + 1e-9).all()
    assert scales[-1] == 1
    assert np.isfinite(scale_from_range(np.array(1e9), 127))


def test_weights_of_one_scale():
    weights = np.array([[-1.0, 0.5], [0.004, 0.25]], np.float32)
    integers, scale = quantise_weights(weights, levels=7, axis=None)
    assert integers.tolist() == [[-7, 3], [0, 2]]
    assert scale.shape == ()


def test_float16_graph_gets_float16_scales():
    text = (
        """<ir_version: 10, opset_import: ["": 23]> g (float16[5, 7] x) => (float16[5, 11] y) { y = MatMul (x, w) }"""
    )
    random = np.random.default_rng(61)
    weight, x = random.normal(size=(7, 11)).astype(np.float16), random.normal(size=(5, 7)).astype(np.float16)
    outputs = {}
    for dtype, name in ((np.float16, "float16"), (np.float32, "float")):
        model = make_model(text.replace("float16", name), {"w": weight.astype(dtype)})
        quantise_everything(model, make_table(model, {"x": 2.0}))
        scales = [value for key, value in model.graph.initializers.items() if key.endswith("qdq_scale")]
        assert {scale.const_value.numpy().dtype for scale in scales} == {np.dtype(dtype)}
        (outputs[name],) = run_model(model, {"x": x.astype(dtype)})
    # Sums of seven products, rounded to float16.
    np.testing.assert_allclose(outputs["float16"], outputs["float"], rtol=0, atol=2.0**-9 * np.abs(x @ weight).max())


def qdq_constants(model: ir.Model) -> list[np.ndarray]:
    """Integers, scales and zero points of all pairs, in the order of the graph."""
    nodes = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    operands = [value for node in nodes for value in node.inputs if value is not None]
    return [value.const_value.numpy() for value in operands if value.const_value is not None]


def test_cast_to_float16_keeps_the_integers():
    table = measure_table(make_fused_denoiser(), make_feeds())
    models = {}
    for remainder in ("fp32", "fp16"):
        models[remainder] = make_fused_denoiser()
        run_passes(precision_passes("int8", quantise=(InsertQdq(table),), remainder=remainder), models[remainder])
    constants = {remainder: qdq_constants(model) for remainder, model in models.items()}
    assert len(constants["fp32"]) == 6 * 2 * 2 + 9 * 2
    for in_half, exact in zip(constants["fp16"], constants["fp32"], strict=True):
        np.testing.assert_array_equal(in_half.astype(np.float32), exact.astype(np.float32))
    dequantised = [n.outputs[0].dtype for n in models["fp16"].graph if n.op_type == "DequantizeLinear"]
    assert set(dequantised) == {ir.DataType.FLOAT16}
    found, expected = (run_model(models[key], make_feeds())[0] for key in ("fp16", "fp32"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("remainder", ["fp32", "fp16"])
def test_tensorrt_builds_the_graph(remainder: str, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    model = make_fused_denoiser()
    table = measure_table(model, make_feeds())
    run_passes(precision_passes("int8", quantise=(InsertQdq(table),), remainder=remainder), model)
    run_passes(lowering_passes("tensorrt_rtx"), model)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 6
    built = build_engine(Component(SPEC, model), TARGETS["sm89"], tmp_path)
    assert (tmp_path / built.files[0]).stat().st_size > 0
