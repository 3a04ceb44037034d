"""Q/DQ pairs around activations: one static scale per tensor, from a calibration table."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes.matching import add_initializer
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.scales import scale_from_range

_LEVELS = 127


class ActivationPairs:
    """The pairs that have been put into one graph; a tensor that several layers read gets one."""

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
        name = value.name or ""
        limit = self._table.range_of(name)
        if not np.isfinite(limit) or limit < 0:
            raise PassError(
                f"the range of tensor {name!r} is {limit}, expected a finite magnitude", hint="calibrate again"
            )
        step = scale_from_range(np.asarray(limit), _LEVELS).astype(dtype.numpy())
        scale = add_initializer(self._graph, step, f"{name}.qdq_scale")
        if self._zero_point is None:
            self._zero_point = add_initializer(self._graph, np.zeros((), np.int8), "sdc.qdq_zero_point")
        quantise = ir.node("QuantizeLinear", [value, scale, self._zero_point])
        dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], scale, self._zero_point])
        quantise.outputs[0].name, dequantise.outputs[0].name = f"{scale.name}.int8", f"{scale.name}.dequantised"
        quantise.outputs[0].dtype, dequantise.outputs[0].dtype = ir.DataType.INT8, dtype
        quantise.outputs[0].shape = dequantise.outputs[0].shape = value.shape
        producer = value.producer()
        if producer is not None:
            self._graph.insert_after(producer, [quantise, dequantise])
        else:
            self._graph.insert_before(self._graph[0], [quantise, dequantise])
        return dequantise.outputs[0]
