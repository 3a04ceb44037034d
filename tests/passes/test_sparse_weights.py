"""What is 2:4 sparse and what is not: blocks by hand, and weights on every way that they have to a layer."""

from __future__ import annotations

import numpy as np
import pytest
from equality import make_model
from small_graphs import normal

from sdc.passes.sparse_weights import SparseLayers, count_sparse_layers, first_dense_block


def two_of_four(weight: np.ndarray, axis: int) -> np.ndarray:
    """The weight with two of every four values zero, others in every block."""
    random = np.random.default_rng(weight.size)
    moved = np.moveaxis(weight.copy(), axis, -1).reshape(-1, 4)
    moved[np.arange(len(moved))[:, None], [random.permutation(4)[:2] for _ in moved]] = 0
    shape = np.moveaxis(weight, axis, -1).shape
    return np.ascontiguousarray(np.moveaxis(moved.reshape(shape), -1, axis))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_the_first_block_with_three_values_is_found(axis: int) -> None:
    weight = two_of_four(normal(1, 8, 12, 4), axis)
    assert first_dense_block(weight, axis) is None
    place = [5, 3, 2]
    place[axis] = 4 if weight.shape[axis] > 4 else 0
    block = [slice(each, each + 1) for each in place]
    block[axis] = slice(place[axis], place[axis] + 4)
    weight[tuple(block)] = 0
    assert first_dense_block(weight, axis) is None
    block[axis] = slice(place[axis] + 1, place[axis] + 4)
    weight[tuple(block)] = 0.25
    assert first_dense_block(weight, axis) == tuple(place)


def test_four_neighbours_are_blocks_and_not_any_four() -> None:
    """Three neighbours across the border of two blocks are no fault; half of all being zero is not enough."""
    assert first_dense_block(np.array([[0, 0, 1, 1, 1, 0, 0, 1]]), 1) is None
    assert first_dense_block(np.array([[0, 0, 0, 1, 1, 1, 1, 0]]), 1) == (0, 4)
    assert first_dense_block(np.array([0, 1, 1, 1]), 0) == (0,)


GRAPH = """<ir_version: 10, opset_import: ["": 23]> g (float[B, 8, 5, 6] x, float[B, 7, 8] t)
    => (float[B, 4, 3, 4] a, float[B, 7, 4] b, float[B, 7, 8] c, float[5, 4] d, float[B, 4, 8] e, float[B, 4, 3, 4] f)
    <float scale = {0.5}> {
    a = Conv (x, conv)
    b = MatMul (t, right)
    turned = Transpose <perm = [1, 0]> (rows)
    c = MatMul (t, turned)
    d = Gemm <transB = 1> (lines, rows_of_gemm)
    e = MatMul (left, t)
    floats = DequantizeLinear (bytes, scale, zero)
    f = Conv (x, floats)
}"""


def weights(zero_point: int = 0) -> dict[str, np.ndarray]:
    """The weight of every layer, with the axis that is summed over in multiples of 4 but for one."""
    return {
        "conv": two_of_four(normal(2, 4, 8, 3, 3), 1),
        "right": two_of_four(normal(3, 8, 4), 0),
        "rows": two_of_four(normal(4, 8, 8), 1),
        "lines": normal(5, 5, 12),
        "rows_of_gemm": two_of_four(normal(6, 4, 12), 1),
        "left": normal(7, 4, 7),
        "bytes": two_of_four(np.random.default_rng(8).integers(1, 99, (4, 8, 3, 3)).astype(np.int8), 1),
        "zero": np.int8(zero_point),
    }


def test_every_way_of_a_weight_to_its_layer_is_followed() -> None:
    """All but the one whose 7 columns make no blocks."""
    assert count_sparse_layers(make_model(GRAPH, weights())) == SparseLayers(5, 6)


@pytest.mark.parametrize("name", ["conv", "right", "rows", "rows_of_gemm", "bytes"])
def test_one_weight_too_many_makes_a_layer_dense(name: str) -> None:
    changed = weights()
    index = np.argwhere(changed[name] == 0)[-1]
    changed[name][tuple(index)] = 1
    assert count_sparse_layers(make_model(GRAPH, changed)) == SparseLayers(4, 6)


def test_zeros_under_a_zero_point_are_none() -> None:
    assert count_sparse_layers(make_model(GRAPH, weights(zero_point=3))) == SparseLayers(4, 6)


def test_products_of_two_activations_have_no_weights() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[4, 8] x, float[8, 4] y) => (float[4, 4] z)
        { z = MatMul (x, y) }"""
    assert count_sparse_layers(make_model(text, {})) == SparseLayers(0, 0)
