from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from equality import FP32, apply_proven, operators, relative_error, run_model
from small_graphs import normal
from transformer_graph import FEEDS, TRANSFORMER, make_transformer

from sdc.passes.base import run_passes
from sdc.passes.fusion.fuse_bias_geglu import FuseBiasGeGlu
from sdc.passes.lowering.split_geglu import SplitGeGlu
from sdc.passes.pipeline import lowering_passes
from sdc.passes.precision.cast_fp16 import CastFp16
from sdc.passes.precision.quantisation import find_layers
from sdc.passes.simplify.inline_functions import InlineFunctions
from sdc.passes.simplify.remove_unused import RemoveUnused

QUANTISED = TRANSFORMER.replace(
    "product2 = MatMul (normed1, w2)",
    """q = QuantizeLinear (normed1, s, zero)
    d = DequantizeLinear (q, s, zero)
    w2f = DequantizeLinear <axis = 1> (w2q, w2s)
    product2 = MatMul (d, w2f)""",
).replace("int64[1] keep", "float s = {0.03}, int8 zero = {0}, int64[1] keep")


def make_gate(text: str = TRANSFORMER) -> ir.Model:
    model = make_transformer(text)
    FuseBiasGeGlu().run(model)
    return model


def make_quantised(*, axis: int = 1, per_channel: bool = True) -> ir.Model:
    """The gate's weight in int8, scales of very different sizes per column."""
    integers = np.random.default_rng(3).integers(-127, 128, (10, 14)).astype(np.int8)
    scales = np.abs(normal(8, 14)) / 100 if per_channel else np.array(0.01, np.float32)
    text = QUANTISED.replace("axis = 1> (w2q", f"axis = {axis}> (w2q")
    model = make_transformer(text, {"w2q": integers, "w2s": scales})
    FuseBiasGeGlu().run(model)
    return model


def test_two_products_and_no_split() -> None:
    model = make_gate()
    (report, _) = apply_proven([SplitGeGlu(), RemoveUnused()], model, FEEDS)
    assert (report.matched, report.skipped) == (1, ())
    assert operators(model)[9:15] == ["MatMul", "Add", "MatMul", "Add", "Gelu", "Mul"]
    assert "w2" not in model.graph.initializers


def test_approximation_stays() -> None:
    model = make_gate(TRANSFORMER.replace("Gelu (gate)", 'Gelu <approximate = "tanh"> (gate)'))
    apply_proven(SplitGeGlu(), model, FEEDS)
    assert [n.attributes.get_string("approximate") for n in model.graph if n.op_type == "Gelu"] == ["tanh"]


@pytest.mark.parametrize(("axis", "per_channel"), [(1, True), (-1, True), (1, False)])
def test_quantised_weight_is_cut_with_its_scales(axis: int, per_channel: bool) -> None:
    model = make_quantised(axis=axis, per_channel=per_channel)
    apply_proven([SplitGeGlu(), RemoveUnused()], model, FEEDS[:2])
    halves = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8 and value.shape]
    assert [tuple(value.shape.numpy()) for value in halves if value.shape is not None] == [(10, 7), (10, 7)]
    assert operators(model).count("QuantizeLinear") == 1
    quantised = [skipped for skipped in find_layers(model)[1] if skipped.reason == "already quantised"]
    assert len(quantised) == 2


def test_openvinos_lowering_splits_and_others_do_not() -> None:
    for backend, splits in (("openvino", 0), ("onnxruntime", 1), ("tensorrt_rtx", 1)):
        model = make_gate()
        expected = run_model(model, FEEDS[0])
        run_passes(lowering_passes(backend), model)
        assert operators(model).count("Split") == splits
        assert relative_error(model, expected, FEEDS[0]) <= FP32


def test_half_weight_is_cut() -> None:
    model = make_gate()
    expected = run_model(model, FEEDS[0])
    run_passes([CastFp16(), SplitGeGlu(), RemoveUnused(), InlineFunctions(fused=True)], model)
    assert relative_error(model, expected, FEEDS[0]) < 5e-3
    assert {
        value.dtype for value in model.graph.initializers.values() if value.name and value.name.startswith("w2")
    } == {ir.DataType.FLOAT16}


def test_weight_stays_on_disk_until_it_is_written(tmp_path: Path) -> None:
    ir.save(make_gate(), tmp_path / "model.onnx", external_data="model.onnx_data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "model.onnx")
    run_passes([SplitGeGlu(), RemoveUnused()], model)
    halves = [value.const_value for name, value in model.graph.initializers.items() if name.startswith("w2.")]
    assert [type(tensor) for tensor in halves] == [ir.LazyTensor] * 2
    assert np.array_equal(np.hstack([tensor.numpy() for tensor in halves if tensor]), normal(8, 10, 14) / 2)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "y = Add (out, skip)",
            "m = ReduceMean (product2)  o2 = Add (out, skip)  y = Add (o2, m)",
            "that only the gate",
        ),
        ("product2 = MatMul (normed1, w2)", "w2c = Neg (w2)  product2 = MatMul (normed1, w2c)", "no matrix of its own"),
        (
            "y = Add (out, skip)",
            "m = ReduceMean (w2)  m4 = Unsqueeze (m, keep)  y = Sum (out, skip, m4)",
            "no matrix of",
        ),
    ],
)
def test_gate_that_cannot_be_split_says_why(old: str, new: str, reason: str) -> None:
    model = make_gate(TRANSFORMER.replace(old, new))
    report = SplitGeGlu().run(model)
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True]


def test_computed_bias_says_why() -> None:
    model = make_gate()
    gate = next(node for node in model.graph if node.op_type == "BiasGeGlu")
    negated = ir.node("Neg", [gate.inputs[1]])
    model.graph.insert_before(gate, negated)
    gate.replace_input_with(1, negated.outputs[0])
    assert ["the bias is computed" in each.reason for each in SplitGeGlu().run(model).skipped] == [True]


def test_scales_along_the_inputs_are_not_cut() -> None:
    model = make_quantised()
    dequantise = [node for node in model.graph if node.op_type == "DequantizeLinear"][-1]
    dequantise.attributes["axis"] = ir.AttrInt64("axis", 0)
    assert SplitGeGlu().run(model).matched == 0
