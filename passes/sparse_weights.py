"""Whether weights are 2:4 sparse: of every four neighbours along the summed axis at most two are not zero.

That is what sparse tensor cores, of compute capability 8.0 or later, skip the zeros of. Source: Mishra et al.,
"Accelerating Sparse Deep Neural Networks", arXiv:2104.08378, section 2; for a convolution the four are input channels
at one place of the kernel: TensorRT's developer guide, "Structured Sparsity".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sdc.passes.matching import constant_tensor, is_operator

BLOCK, KEPT = 4, 2
"""So many neighbours, and how many of them may be other than zero."""

_RETYPING = ("Cast", "Identity", "DequantizeLinear")
"""What a weight may pass through on its way to a layer, zeros staying zeros."""


def first_dense_block(weight: np.ndarray, axis: int) -> tuple[int, ...] | None:
    """Where the first block of four with more than two values other than zero begins; None if there is none.

    Args:
        weight: of any shape and type.
        axis: along which the blocks lie; its length is a multiple of 4.

    Returns:
        The index of the block's first value in `weight`. Blocks are gone through in the order of the other axes.
    """
    moved = np.moveaxis(weight, axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], -1, BLOCK)
    for part in (blocks[:1], blocks):  # a dense weight is left after its first row
        dense = np.argwhere(np.count_nonzero(part != 0, axis=-1) > KEPT)
        if len(dense):
            *others, block = dense[0].tolist()
            others.insert(axis % weight.ndim, block * BLOCK)
            return tuple(others)
    return None


@dataclass(frozen=True)
class SparseLayers:
    """Layers of a graph by their weights.

    Attributes:
        sparse: convolutions and matrix products whose weights are 2:4 in every block.
        weighted: those that have constant weights, the sparse ones among them.
    """

    sparse: int
    weighted: int


def count_sparse_layers(model: ir.Model) -> SparseLayers:
    """Look at the weights themselves of every Conv, MatMul and Gemm: floats, or integers without a zero point."""
    sparse = weighted = 0
    for node in model.graph:
        if not any(is_operator(node, operator) for operator in ("Conv", "MatMul", "Gemm")):
            continue
        found = _weight_of(node)
        if found is None:
            continue
        weighted += 1
        weight, axis, symmetric = found
        if symmetric and weight.shape[axis] % BLOCK == 0:
            sparse += first_dense_block(weight, axis) is None
    return SparseLayers(sparse, weighted)


def _weight_of(node: ir.Node) -> tuple[np.ndarray, int, bool] | None:
    """A layer's constant, its axis that is summed over, and whether zeros are stored as such; None without a constant.

    A constant on the left of a matrix product is a weight too.
    """
    for position in (1, 0):
        value, axis, symmetric = node.inputs[position], _summed_axis(node, position), True
        while value is not None and (source := value.producer()) is not None:
            if source.op_type == "Transpose" and "perm" in source.attributes:
                axis = source.attributes["perm"].as_ints()[axis]
            elif source.op_type not in _RETYPING:
                break
            symmetric = symmetric and _is_symmetric(source)
            value = source.inputs[0]
        tensor = constant_tensor(value)
        if tensor is not None and len(tensor.shape) > 1:
            return tensor.numpy(), axis, symmetric
    return None


def _summed_axis(node: ir.Node, position: int) -> int:
    if node.op_type == "Conv":
        return 1
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB" if position else "transA") == 1
    return -1 if (position == 0) != transposed else -2


def _is_symmetric(node: ir.Node) -> bool:
    if node.op_type != "DequantizeLinear" or len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    zero_point = constant_tensor(node.inputs[2])
    return zero_point is not None and not np.any(zero_point.numpy())
