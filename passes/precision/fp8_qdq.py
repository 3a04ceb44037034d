"""Eight-bit floats (E4M3): activations behind pairs with one static scale, weights with one for each output channel."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sdc.passes.matching import add_initializer
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.qdq_pair import insert_pair
from sdc.passes.precision.range_rules import MAX, RangeRule
from sdc.passes.precision.scales import scale_from_range

FP8_MAX = 448
"""Largest finite value. Source: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433, table 1."""

_EVERYTHING = RangeRule(MAX)
"""A float's steps grow with its values: cutting the largest off gains nothing for the others."""


class Fp8Pairs:
    """The pairs around activations that have been put into one graph; a tensor that several layers read gets one."""

    def __init__(self, graph: ir.Graph, table: CalibrationTable) -> None:
        self._graph = graph
        self._table = table
        self._dequantised: dict[ir.Value, ir.Value] = {}
        self._zero_point: ir.Value | None = None

    def __len__(self) -> int:
        return len(self._dequantised)

    def dequantised(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` behind a pair, in `dtype`.

        Raises:
            PassError: the table has no range for it, or one that is not finite.
        """
        if value not in self._dequantised:
            self._dequantised[value] = self._insert_pair(value, dtype)
        return self._dequantised[value]

    def _insert_pair(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        limit = self._table.range_of(value.name or "", _EVERYTHING).high
        step = scale_from_range(np.asarray(limit), FP8_MAX).astype(dtype.numpy())
        scale = add_initializer(self._graph, step, f"{value.name}.fp8_scale")
        if self._zero_point is None:
            zero = np.zeros((), ml_dtypes.float8_e4m3fn)
            self._zero_point = add_initializer(self._graph, zero, "sdc.fp8_zero_point")
        return insert_pair(self._graph, value, scale, self._zero_point, dtype, kind="fp8")


def fp8_weights(weights: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight in E4M3, with scales that put the largest magnitude of each output channel at the largest value.

    Returns:
        The values (float8_e4m3fn, the weight's shape) and the scales (float32, [weights.shape[axis]]).
    """
    others = tuple(i for i in range(weights.ndim) if i != axis)
    scale = scale_from_range(np.abs(weights).max(axis=others), FP8_MAX)
    return (weights / np.expand_dims(scale, others)).astype(ml_dtypes.float8_e4m3fn), scale
