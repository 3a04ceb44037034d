"""Give every node and value a name of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from sdc.passes.base import Pass, PassReport


@dataclass(frozen=True)
class FixNames(Pass):
    """Node and value names are non-empty and unique; names of inputs and outputs stay.

    Calibration ranges and reports refer to tensors by these names, so they are the same whenever the same graph is
    made again. No pass matches by them.
    """

    name: ClassVar[str] = "fix-names"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Rename where needed; the match count is the number of new names."""
        before = _names(model)
        NameFixPass()(model)
        return PassReport(name=self.name, matched=sum(a != b for a, b in zip(before, _names(model), strict=True)))


def _names(model: ir.Model) -> list[str | None]:
    names = [value.name for value in (*model.graph.inputs, *model.graph.initializers.values())]
    for node in model.graph:
        names.append(node.name)
        names.extend(output.name for output in node.outputs)
    return names
