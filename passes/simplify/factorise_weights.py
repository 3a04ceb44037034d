"""factorise-weights: a layer whose weight has a low rank, or is given one, becomes two with fewer multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import add_initializer, constant, is_operator, replace_by_several, site

LOW_RANK = "sdc_low_rank"
"""Entry of a checkpoint's configuration, with ranks of layers by name, and of the metadata of a graph exported from it.

The weights themselves are dense, so that whatever knows the network's class loads them. The entry says that looking for
factors is worth the time; they are found in the weights: a LoRA that is folded in raises ranks.
"""

LEAST_ENERGY_LOST = 1e-12
"""What is less of a weight's energy cannot be told from rounding; see `FactoriseWeights`."""


@dataclass(frozen=True)
class FactoriseWeights(Pass):
    """Weights that are products of thin matrices, or nearly so, are stored, and multiplied, as these.

    Before → after, r the rank of the weight::

        MatMul(x, W [k, n])            →  MatMul(MatMul(x, A [k, r]), B [r, n])
        Gemm(x, W, c)                  →  Gemm(Gemm(x, A), B, c)                 alpha, beta and transB as they were
        Conv(x, W [n, m, ...], b)      →  Conv(Conv(x, A [r, m, ...]), B [n, r, 1, ...], b)
                                          strides, pads and dilations with the first

    1. The weight is a float32 matrix, or a float32 kernel of one group, that no other operator computes.
    2. Its rank r is the least at which the rest, by the Frobenius norm, is at most `tolerance` of the weight: what the
       result may change by, relative to what the weight at most does. With `energy`, r is the least that keeps this
       share of the weight's squared singular values, whose sum is the squared norm: the rest is at most
       sqrt(1 - energy) of the weight, and results change by about as much.
    3. r (k + n) < k n, for a convolution with k = m times the kernel's size: there are fewer multiply-adds.

    Not matched, and named with the reason: a weight whose rank saves nothing, in another type, with more axes than two;
    a Gemm with a transposed activation, several groups. Passed without a word: an activation on the right of a MatMul
    and, without `energy`, a weight of full rank. With `energy` a second run cuts what the first one left.

    Source of the convolution's two: Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and
    Detection", arXiv:1505.06798, section 3.1. The rank is read off the eigenvalues of the smaller Gram matrix, in
    float64, where squares as small as 1e-16 of the largest are noise: `tolerance` has to be well above 1e-8.

    Attributes:
        tolerance: between 1e-6 and 1.
        energy: above 0, and at least `LEAST_ENERGY_LOST` below 1; in the place of `tolerance` if it is given.
    """

    tolerance: float = 1e-5
    energy: float | None = None
    name: ClassVar[str] = "factorise-weights"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Split all layers that it pays for.

        The details have each one's rank, weights before and after, and the share of its energy that the rest was.
        """
        graph, skipped = model.graph, []
        found: dict[str, dict[str, float]] = {}
        tolerance = self.tolerance if self.energy is None else (1 - self.energy) ** 0.5
        for node in list(graph):
            weight = _weight_of(node)
            if isinstance(weight, str):
                skipped.append(Skipped(site(node), weight))
            if not isinstance(weight, np.ndarray):
                continue
            matrix = weight.reshape(weight.shape[0], -1)
            full_rank = min(matrix.shape)
            split = low_rank_factors(matrix, tolerance)
            if split is None and self.energy is None:
                continue
            rank = full_rank if split is None else split[0].shape[1]
            if split is None or rank * sum(matrix.shape) >= matrix.size:
                skipped.append(Skipped(site(node), f"rank {rank} of {full_rank} takes no fewer multiply-adds"))
                continue
            left, right = split
            counts = {"rank": rank, "full_rank": full_rank, "weights_before": matrix.size}
            lost = _energy_lost(matrix, left, right)
            found[site(node)] = {**counts, "weights_after": left.size + right.size, "energy_lost": lost}
            _split(graph, node, left, right, weight.shape)
        return PassReport(self.name, len(found), tuple(skipped), details={"layers": found} if found else None)


def low_rank_factors(matrix: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Factors of the least rank whose product is within `tolerance` of a matrix; None if that is its full rank.

    Args:
        matrix: [m, k], float32.
        tolerance: Frobenius norm of the rest, over that of the matrix.

    Returns:
        [m, r] and [r, k], float32; the one on the matrix's shorter side has orthonormal vectors. Of zeros, r is 1.
    """
    exact = matrix.astype(np.float64)
    is_wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = np.linalg.eigh(exact @ exact.T if is_wide else exact.T @ exact)  # rising
    rest = np.cumsum(np.maximum(squares, 0))
    rank = max(1, int(np.count_nonzero(rest > tolerance**2 * rest[-1])))
    if rank == len(squares):
        return None
    kept = vectors[:, -rank:]
    left, right = (kept, kept.T @ exact) if is_wide else (exact @ kept, kept.T)
    return np.ascontiguousarray(left, np.float32), np.ascontiguousarray(right, np.float32)


def _energy_lost(matrix: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    """Squared norm of the rest over that of the matrix, to three digits."""
    rest = matrix - left @ right
    return float(f"{(np.linalg.norm(rest) / max(np.linalg.norm(matrix), np.finfo(np.float32).tiny)) ** 2:.3g}")


def _weight_of(node: ir.Node) -> np.ndarray | str | None:
    """The weight of a layer that can be split, as it is stored; why not, for another weight; None for anything else."""
    if not any(is_operator(node, operator) for operator in ("MatMul", "Gemm", "Conv")):
        return None
    weight = constant(node.inputs[1])
    if weight is None:
        return None
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype}, not float32"
    if weight.ndim < 2 or (weight.ndim > 2 and node.op_type != "Conv"):
        return f"its weight has {weight.ndim} axes, no matrix's two"
    groups = node.attributes.get_int("group", 1)
    if groups != 1:
        return f"it has {groups} groups"
    return "its activation is transposed" if node.attributes.get_int("transA") == 1 else weight


def _split(graph: ir.Graph, node: ir.Node, left: np.ndarray, right: np.ndarray, shape: tuple[int, ...]) -> None:
    """Put two layers in the place of one: its weight, of `shape`, is left @ right with its later axes flattened."""
    activation, weight, *bias = node.inputs
    assert weight is not None
    rank = left.shape[1]
    first_attributes: dict[str, Any] = {}
    second_attributes: dict[str, Any] = dict(node.attributes.items())
    if node.op_type == "Conv":
        first_attributes, second_attributes = second_attributes, {}
        factors = (right.reshape(rank, *shape[1:]), left.reshape(shape[0], rank, *(1 for _ in shape[2:])))
    elif node.op_type == "Gemm" and node.attributes.get_int("transB") == 1:
        first_attributes = {"transB": 1}
        factors = (right, left)
    else:
        factors = (left, right)
    thin, wide = (
        add_initializer(graph, factor, f"{weight.name}.factor_{number}") for number, factor in enumerate(factors)
    )
    first = ir.node(node.op_type, [activation, thin], first_attributes)
    second = ir.node(node.op_type, [first.outputs[0], wide, *bias], second_attributes)
    inner, output = first.outputs[0], node.outputs[0]
    inner.name, inner.type = f"{output.name}.factor", output.type
    if output.shape is not None:
        axis = 1 if node.op_type == "Conv" else len(output.shape) - 1
        inner.shape = ir.Shape([rank if place == axis else size for place, size in enumerate(output.shape)])
    first.name = f"{node.name}.factor" if node.name else None
    replace_by_several([node], [first, second], [output], second.outputs, at=node)
