"""Find out types and shapes that the graph does not state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from sdc.passes.base import Pass, PassReport, Skipped


@dataclass(frozen=True)
class InferShapes(Pass):
    """Values have a type and a shape wherever the operators' schemas tell them.

    What the graph states already stays as it is: an exporter knows relations between free sizes that inference does
    not. A graph without gaps is not touched. Values that remain unknown are reported as skipped, by operator.
    """

    name: ClassVar[str] = "infer-shapes"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Infer; the match count is the number of values that got a type or a shape."""
        gaps = _values_with_gaps(model.graph)
        if not gaps:
            return PassReport(name=self.name, matched=0)
        stated = [(value, value.shape, value.dtype) for node in model.graph for value in node.outputs]
        # Not strict: a fused or contributed operator without a schema leaves its readers to what is stated.
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
        for value, shape, dtype in stated:
            value.shape = shape if shape is not None else value.shape
            if dtype is not None:
                value.type = ir.TensorType(dtype)  # a clone shares its type object with the original
        unknown = {value.producer().op_type for value in _values_with_gaps(model.graph)}  # type: ignore[union-attr]
        filled = len(gaps) - len(_values_with_gaps(model.graph))
        skipped = tuple(Skipped(op_type, "type or shape of an output is unknown") for op_type in sorted(unknown))
        return PassReport(name=self.name, matched=filled, skipped=skipped)


def _values_with_gaps(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs if value.shape is None or value.dtype is None]
