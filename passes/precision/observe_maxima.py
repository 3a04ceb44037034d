"""observe-maxima: let a graph tell the largest magnitude of chosen tensors, in one small extra output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes.base import Pass, PassReport

MAXIMA = "absolute_maxima"
"""Name of the extra output: float32, [len(tensors)]."""


@dataclass(frozen=True)
class ObserveMaxima(Pass):
    """The graph gains one output with the largest magnitude of each tensor.

    Before → after::

        x, y, ...  →  x, y, ...; absolute_maxima = Concat(ReduceMax(Abs(x)), ReduceMax(Abs(y)), ...)

    1. Every tensor is an input of the graph or the output of a node of the main graph.

    The reduction happens inside the run, so that memory does not grow with the number of tensors or of runs.

    Attributes:
        tensors: names, in the order of the output.
    """

    name: ClassVar[str] = "observe-maxima"

    tensors: tuple[str, ...]

    def rewrite(self, model: ir.Model) -> PassReport:
        """Add the output.

        Raises:
            PassError: a tensor is not in the main graph, or none is named.
        """
        graph = model.graph
        values = {value.name: value for value in graph.inputs}
        values.update({value.name: value for node in graph for value in node.outputs})
        missing = [name for name in self.tensors if name not in values]
        if missing or not self.tensors:
            raise PassError(f"cannot observe {len(missing)} of {len(self.tensors)} tensors: {missing[:3]}")
        one = ir.Value(name=f"{MAXIMA}.shape", const_value=ir.tensor(np.array([1], np.int64)))
        graph.register_initializer(one)
        rows = []
        for index, name in enumerate(self.tensors):
            magnitude = ir.node("Abs", [values[name]])
            largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
            row = ir.node("Reshape", [largest.outputs[0], one])
            graph.extend([magnitude, largest, row])
            row.outputs[0].name = f"{MAXIMA}.{index}"
            rows.append(row.outputs[0])
        joined = ir.node("Concat", rows, {"axis": 0})
        joined.outputs[0].name = MAXIMA
        joined.outputs[0].shape = ir.Shape([len(rows)])
        joined.outputs[0].dtype = ir.DataType.FLOAT
        graph.append(joined)
        graph.outputs.append(joined.outputs[0])
        return PassReport(self.name, len(rows))
