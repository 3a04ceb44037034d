"""Multiply-adds against sums by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import make_denoiser, make_feeds, make_fused_denoiser, make_model, measure_table

from sdc.engines.errors import InputError
from sdc.passes.base import run_passes
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.macs import count_macs, static_shapes
from sdc.passes.pipeline import precision_passes
from sdc.passes.precision.insert_qdq import InsertQdq

SIZES = {"B": 2, "H": 5, "W": 7}
PIXELS = 2 * 5 * 7

MACS_BY_HAND = {
    "first": PIXELS * 6 * 3 * 9,
    "time_1": 2 * 1 * 4,
    "time_3": 2 * 4 * 9,
    "inner_1": PIXELS * 9 * 6 * 9,
    "skip": PIXELS * 9 * 6,
    "block": PIXELS * 9 * 9 * 9,
    "projected": PIXELS * 32 * 9,
    "query": PIXELS * 32 * 32,
    "key": 2 * 5 * 7 * 32,
    "value": 2 * 5 * 7 * 32,
    "attended": 2 * (35 * 5 * 32 + 35 * 5 * 32),  # Q·Kᵀ and P·V: 35 queries, 5 keys, 32 channels
    "mixed": PIXELS * 32 * 32,
    "back": PIXELS * 9 * 32,
    "out_sample": PIXELS * 3 * 9 * 9,
}


def test_counts_by_hand_and_leaves_the_model_alone():
    model = make_denoiser()
    before, shapes = digest_from_model(model), [str(o.shape) for node in model.graph for o in node.outputs]
    count = count_macs(model, SIZES)
    assert {product.site: product.macs for product in count.products} == MACS_BY_HAND
    assert count.total == sum(MACS_BY_HAND.values())
    assert count.weighted == count.total - MACS_BY_HAND["attended"]
    assert count.quantised == 0
    assert digest_from_model(model) == before
    assert [str(o.shape) for node in model.graph for o in node.outputs] == shapes


def test_fused_graph_counts_the_same():
    count = count_macs(make_fused_denoiser(), SIZES)
    assert (count.total, count.weighted) == (count_macs(make_denoiser(), SIZES).total, count.weighted)


@pytest.mark.parametrize("parts", [2, 30])
def test_parts_of_a_tensor_have_shapes(parts: int):
    """As many as there are projections of the timestep in one input of SD 1.5's UNet."""
    sizes = np.arange(1, parts + 1)
    names = [f"part{index}" for index in range(parts)]
    text = f"""<ir_version: 10, opset_import: ["": 23]> g (float[B, {sizes.sum()}] x) => (float[B, 5] y) {{
        {", ".join(names)} = Split <axis = 1> (x, sizes)
        y = MatMul ({names[-1]}, w) }}"""
    model = make_model(text, {"sizes": sizes, "w": np.ones((parts, 5), np.float32)})
    shapes = static_shapes(model, {"B": 3})
    assert [shapes[name] for name in names] == [(3, size) for size in sizes]
    assert count_macs(model, {"B": 3}).total == 3 * parts * 5
    assert [node.op_type for node in model.graph] == ["Split", "MatMul"]


def test_float16_counts_the_same():
    """Bodies of fused operators state no types."""
    model = make_fused_denoiser()
    expected = count_macs(model, SIZES)
    run_passes(precision_passes("fp16"), model)
    assert count_macs(model, SIZES).total == expected.total


def test_quantised_share():
    model = make_denoiser()
    InsertQdq(measure_table(model, make_feeds())).run(model)
    count = count_macs(model, SIZES)
    quantised = sum(MACS_BY_HAND[site] for site in ("inner_1", "block", "projected", "query", "key", "value", "mixed"))
    assert count.quantised == quantised
    assert count.weighted == sum(MACS_BY_HAND.values()) - MACS_BY_HAND["attended"]
    assert count.quantised_share == quantised / count.weighted
    assert count.quantised_share_of_total == quantised / count.total


def test_weights_alone_do_not_make_a_product_of_integers():
    model = make_denoiser()
    InsertQdq(measure_table(model, make_feeds())).run(model)
    node = next(node for node in model.graph if node.outputs[0].name == "mixed")
    node.replace_input_with(0, next(each for each in model.graph if each.op_type == "Attention").outputs[0])
    products = {product.site: product for product in count_macs(model, SIZES).products}
    assert (products["mixed"].weighted, products["mixed"].quantised) == (True, False)
    assert products["block"].quantised


def test_matmul_of_activations_is_attention_work():
    text = """<ir_version: 10, opset_import: ["": 23]>
        g (float[N, 3, 5] x, float[N, 5, 7] z) => (float[N, 3, 7] y) { y = MatMul (x, z) }"""
    count = count_macs(make_model(text, {}), {"N": 11})
    assert (count.total, count.weighted, count.quantised_share) == (11 * 3 * 5 * 7, 0, 0.0)


def test_expressions_in_shapes_are_evaluated():
    model = make_denoiser()
    model.graph.inputs[0].shape = ir.Shape(["B", 3, "5*H", "7*W"])
    assert count_macs(model, {"B": 2, "H": 1, "W": 1}).total == sum(MACS_BY_HAND.values())


def test_missing_size_is_named():
    with pytest.raises(InputError, match=r"\['W'\] of input 'sample'"):
        count_macs(make_denoiser(), {"B": 2, "H": 5})
