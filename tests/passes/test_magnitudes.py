"""What float16 does not hold is found in float32, and an island of float32 around it keeps the rest in float16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from equality import make_model, run_model
from onnx.reference import ReferenceEvaluator
from small_denoiser import make_feeds, make_fused_denoiser, make_table, measure_table
from small_denoiser import run_model as run_denoiser
from small_graphs import normal

from sdc.engines.errors import PassError
from sdc.passes.base import run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes, precision_passes
from sdc.passes.precision.cast_fp16 import CastFp16
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.magnitudes import LIMIT, MAGNITUDES, Overflow, find_overflow, observe_magnitudes
from sdc.passes.simplify.inline_functions import InlineFunctions

# A convolution before a norm may have any scale: the norm takes it out again.
TEXT = """
<ir_version: 10, opset_import: ["": 23]>
block (float[B, 6, H, W] x) => (float[B, 6, H, W] y)
{
    large = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    normed = GroupNormalization <num_groups = 3, epsilon = 1e-5> (large, gamma, beta)
    gate = Sigmoid (normed)
    active = Mul (normed, gate)
    y = Conv <pads = [1, 1, 1, 1]> (active, w2)
}
"""


def make_block(scale: float, *, fused: bool = True) -> ir.Model:
    weights = {
        "w1": scale * normal(1, 9, 6, 3, 3) / 7,
        "b1": scale * normal(2, 9),
        "gamma": normal(3, 9),
        "beta": normal(4, 9),
        "w2": normal(5, 6, 9, 3, 3) / 9,
    }
    model = make_model(TEXT, weights)
    run_passes([*canonical_passes(), *(fusion_passes() if fused else ())], model)
    return model


def feed() -> dict[str, np.ndarray]:
    return {"x": normal(6, 2, 6, 5, 7)}


def reference_output(model: ir.Model) -> np.ndarray:
    flat = model.clone()
    InlineFunctions(fused=True).run(flat)
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(flat))
    with np.errstate(over="ignore", invalid="ignore"):
        (found,) = ReferenceEvaluator(proto).run(None, feed())
    return found


def overflow_of(model: ir.Model) -> Overflow | None:
    observed = observe_magnitudes(model)
    return find_overflow(observed, run_model(observed.model, feed())[MAGNITUDES])


def test_tensors_are_read_where_they_are_written():
    observed = observe_magnitudes(make_block(1.0, fused=False))
    nodes = list(observed.model.graph)
    places = {value.name: index for index, node in enumerate(nodes) for value in node.outputs}
    for name in observed.tensors:
        behind = nodes[places[name] + 1]
        assert (behind.op_type, behind.inputs[0].name) == ("Abs", name)


def test_magnitudes_are_those_of_the_tensors():
    observed = observe_magnitudes(make_block(3.0, fused=False))
    graph = observed.model
    for name in observed.tensors:
        value = next(each for node in graph.graph for each in node.outputs if each.name == name)
        if value not in graph.graph.outputs:
            graph.graph.outputs.append(value)
    outputs = run_model(graph, feed())
    expected = [np.abs(outputs[name]).max() for name in observed.tensors]
    np.testing.assert_array_equal(outputs[MAGNITUDES], expected)
    assert len(set(observed.tensors)) == len(observed.tensors) >= 5


@pytest.mark.parametrize("fused", [True, False])
def test_island_is_what_writes_and_what_reads(fused: bool):
    model = make_block(1e6, fused=fused)
    overflow = overflow_of(model)
    assert overflow is not None
    assert overflow.first == "large"
    assert overflow.tensors == 1
    names = {node.outputs[0].name: node.op_type for node in model.graph}
    assert [names[name] for name in overflow.float32].count("Conv") == 1
    assert len(overflow.float32) == 2
    assert LIMIT < overflow.magnitude < 1e7


def test_what_fits_needs_no_island():
    assert overflow_of(make_block(1.0)) is None


@pytest.mark.parametrize("fused", [True, False])
def test_island_gives_the_right_values(fused: bool):
    model = make_block(1e6, fused=fused)
    expected = run_model(model, feed())["y"]
    overflow = overflow_of(model)
    assert overflow is not None
    broken, mended = model.clone(), model.clone()
    run_passes(precision_passes("fp16"), broken)
    report = CastFp16(float32=frozenset(overflow.float32)).run(mended)
    assert report.details is not None
    assert report.details["float32_nodes"] == 2
    # ONNX Runtime's CPU provider computes in float32 and skips the roundings between its kernels; ONNX's does not.
    assert not np.isfinite(reference_output(broken)).all()
    found = reference_output(mended)
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-3 * np.abs(expected).max())
    last = [node for node in mended.graph if node.op_type == "Conv"][-1]
    assert last.outputs[0].dtype == ir.DataType.FLOAT16


def test_value_inside_of_a_fused_operator_counts():
    model = make_block(1.0)
    fused = next(node for node in model.graph if node.domain == "sdc")
    observed = observe_magnitudes(model)
    inner = [index for index, name in enumerate(observed.sites) if name == fused.outputs[0].name]
    assert len(inner) > 1
    magnitudes = np.ones(len(observed.tensors), np.float32)
    magnitudes[inner[0]] = 1e6
    overflow = find_overflow(observed, magnitudes)
    assert overflow is not None
    assert fused.outputs[0].name in overflow.float32


def test_infinity_fits_and_one_value_beyond_does_not():
    observed = observe_magnitudes(make_block(1.0))
    magnitudes = np.full(len(observed.tensors), LIMIT, np.float32)
    magnitudes[2] = np.inf
    assert find_overflow(observed, magnitudes) is None
    magnitudes[1] = np.nextafter(np.float32(LIMIT), np.float32(np.inf))
    assert find_overflow(observed, magnitudes) is not None


def test_graph_without_float32_is_refused():
    text = '<ir_version: 10, opset_import: ["": 23]> g (float16[5] x) => (float16[5] y) { y = Neg (x) }'
    with pytest.raises(PassError, match="no float32 tensors"):
        observe_magnitudes(make_model(text, {}))


def test_pairs_before_an_island_stay_in_float32():
    # 127 steps of a range beyond float16 are more than float16 holds.
    model, feeds = make_fused_denoiser(), make_feeds()
    table = measure_table(model, feeds)
    wide = make_table(model, {"block_1": 3e5}).tensors
    quantise = (InsertQdq(replace(table, tensors={**table.tensors, **wide})),)
    run_passes(precision_passes("int8", quantise=quantise, float32=frozenset({"block"})), model)
    layer = next(node for node in model.graph if node.outputs[0].name == "block")
    pair = layer.inputs[0].producer()
    assert pair.op_type == "DequantizeLinear"
    assert pair.outputs[0].dtype == pair.inputs[0].producer().inputs[0].dtype == ir.DataType.FLOAT
    assert np.isfinite(run_denoiser(model, feeds)[0]).all()


def test_nodes_that_do_not_exist_are_refused():
    with pytest.raises(PassError, match="no node with the outputs"):
        CastFp16(float32=frozenset({"elsewhere"})).run(make_block(1.0))
