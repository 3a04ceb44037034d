from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from equality import FP32, apply_proven, operators, relative_error, run_model
from small_graphs import ATTENTION, feed_attention, make_attention, normal

from sdc.passes.base import run_passes
from sdc.passes.fusion.fuse_attention import FuseAttention
from sdc.passes.lowering.merge_projections import MergeProjections
from sdc.passes.pipeline import lowering_passes
from sdc.passes.precision.cast_fp16 import CastFp16
from sdc.passes.simplify.remove_unused import RemoveUnused

FEEDS = [feed_attention(), feed_attention(batch=1, tokens=23)]
SELF = ATTENTION.replace("MatMul (context, wk)", "MatMul (x, wk)").replace("MatMul (context, wv)", "MatMul (x, wv)")


def make_self(text: str = SELF) -> ir.Model:
    """Self-attention with a weight for each of query, key and value."""
    model = make_attention(text, {"wk": normal(2, 10, 15), "wv": normal(3, 10, 15)})
    run_passes([FuseAttention(), RemoveUnused()], model)
    return model


def test_one_product_is_split() -> None:
    model = make_self()
    (report, _) = apply_proven([MergeProjections(), RemoveUnused()], model, FEEDS)
    assert (report.matched, report.skipped) == (1, ())
    assert operators(model) == ["MatMul", "Split", "sdc.MultiHeadAttention", "MatMul"]
    assert {"wq", "wk", "wv"}.isdisjoint(model.graph.initializers)


def test_half_is_close() -> None:
    model = make_self()
    expected = run_model(model, FEEDS[0])
    run_passes([CastFp16(), MergeProjections()], model)
    assert operators(model).count("MatMul") == 2
    assert relative_error(model, expected, FEEDS[0]) < 5e-3


def test_weights_stay_on_disk_until_they_are_written(tmp_path: Path) -> None:
    ir.save(make_self(), tmp_path / "model.onnx", external_data="model.onnx_data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "model.onnx")
    run_passes([MergeProjections(), RemoveUnused()], model)
    joined = next(value.const_value for name, value in model.graph.initializers.items() if name.endswith(".joined"))
    assert isinstance(joined, ir.LazyTensor)
    assert joined.numpy().shape == (10, 45)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "y = MatMul (merged, wo)",
            "m = ReduceMean (key)  p = MatMul (merged, wo)  y = Add (p, m)",
            "something besides",
        ),
        ("value = MatMul (x, wv)", "wv2 = Neg (wv)  value = MatMul (x, wv2)", "no matrix of its own"),
        ("value = MatMul (x, wv)", "value = MatMul (x, wk)", "no matrix of its own"),
    ],
)
def test_projection_that_cannot_be_merged_says_why(old: str, new: str, reason: str) -> None:
    report = MergeProjections().run(make_self(SELF.replace(old, new)))
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True]


def test_quantised_weights_stay() -> None:
    model = make_self()
    product = next(node for node in model.graph if node.op_type == "MatMul")
    scale = ir.Value(name="s", shape=ir.Shape([]), const_value=ir.tensor(0.5, name="s"))
    model.graph.register_initializer(scale)
    dequantise = ir.node("DequantizeLinear", [product.inputs[1], scale])
    model.graph.insert_before(product, dequantise)
    product.replace_input_with(1, dequantise.outputs[0])
    assert ["in floating point" in each.reason for each in MergeProjections().run(model).skipped] == [True]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("MatMul (x, wk)", "MatMul (x2, wk)"),
        ("value = MatMul (x, wv)", "v0 = MatMul (x, wv)  value = Add (v0, v0)"),
    ],
    ids=["another input", "no MatMul"],
)
def test_other_projections_are_no_candidate(old: str, new: str) -> None:
    text = SELF.replace(old, new).replace("query = ", "x2 = Neg (x)  query = ")
    report = MergeProjections().run(make_self(text))
    assert (report.matched, report.skipped) == (0, ())


def test_equality_sees_queries_and_keys_swapped() -> None:
    model = make_self()
    expected = run_model(model, FEEDS[0])
    MergeProjections().run(model)
    attention = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    query, key = attention.inputs[:2]
    attention.replace_input_with(0, key)
    attention.replace_input_with(1, query)
    assert relative_error(model, expected, FEEDS[0]) > 10 * FP32


def test_onnxruntimes_lowering_merges_and_others_do_not() -> None:
    for backend, products in (("onnxruntime", 2), ("openvino", 4), ("tensorrt_rtx", 6)):
        model = make_self()
        expected = run_model(model, FEEDS[0])
        run_passes(lowering_passes(backend), model)
        assert operators(model).count("MatMul") == products, backend
        assert relative_error(model, expected, FEEDS[0]) <= FP32
