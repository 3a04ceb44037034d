"""Q/DQ pairs around activations: one scale and zero point per tensor, from a calibration table or found in each run.

    q = saturate(round(x / s) + z),  x' = s · (q - z)

A symmetric range ±r has s = r / 127 and z = 0. Any other range [a, b], which holds zero, has s = (b - a) / 255 and the
integer z = round(-128 - a / s), so that zero is exact: padding adds nothing.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877, equations 1 and 10-12.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdc.passes.matching import add_initializer
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.qdq_pair import insert_dynamic_pair, insert_pair
from sdc.passes.precision.range_rules import DYNAMIC, Range, RangeRule
from sdc.passes.precision.scales import affine_from_limits


class ActivationPairs:
    """The pairs that have been put into one graph; a tensor that several layers read gets one."""

    def __init__(self, graph: ir.Graph, table: CalibrationTable, rule: RangeRule) -> None:
        self._graph = graph
        self._table = table
        self._rule = rule
        self._dequantised: dict[ir.Value, ir.Value] = {}
        self._zero_points: dict[int, ir.Value] = {}

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
        if self._rule.method == DYNAMIC:
            return insert_dynamic_pair(self._graph, value, dtype)
        name = value.name or ""
        step, integer = affine_from_range(self._table.range_of(name, self._rule), symmetric=self._rule.symmetric)
        scale = add_initializer(self._graph, step.astype(dtype.numpy()), f"{name}.qdq_scale")
        return insert_pair(self._graph, value, scale, self._zero_point(integer), dtype, kind="int8")

    def _zero_point(self, integer: int) -> ir.Value:
        if integer not in self._zero_points:
            name = "sdc.qdq_zero_point" if integer == 0 else f"sdc.qdq_zero_point.{integer}"
            self._zero_points[integer] = add_initializer(self._graph, np.array(integer, np.int8), name)
        return self._zero_points[integer]


def affine_from_range(limits: Range, *, symmetric: bool) -> tuple[np.ndarray, int]:
    """Scale ([], float32, a float16 value) and zero point of a range that holds zero."""
    scale, integer = affine_from_limits(np.asarray(limits.low), np.asarray(limits.high), symmetric=symmetric)
    return scale, int(integer)
