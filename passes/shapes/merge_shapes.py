"""Ask for the same sizes once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.base import Pass, PassReport
from sdc.passes.matching import dimensions, is_operator


@dataclass(frozen=True)
class MergeShapes(Pass):
    """Shapes of tensors that are known to have the same sizes are one node.

    Before → after, x and y both [B, C, H, W]::

        a = Shape(x), b = Shape(y)  →  a

    Preconditions:

    1. All the sizes that a Shape gives are known: a number or a symbol, which stands for one size in the whole graph.
    2. They are the same in the same order.

    Not matched: Shapes whose output is an output of the graph.
    """

    name: ClassVar[str] = "merge-shapes"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Let the first Shape of each kind serve the readers of the others."""
        first: dict[tuple[int | str | None, ...], ir.Value] = {}
        matched = 0
        for node in list(model.graph):
            if not is_operator(node, "Shape") or node.outputs[0].is_graph_output():
                continue
            sizes = _sizes(node)
            if sizes is None or None in sizes:
                continue
            kept = first.setdefault(sizes, node.outputs[0])
            if kept is not node.outputs[0]:
                node.outputs[0].replace_all_uses_with(kept)
                model.graph.remove(node, safe=True)
                matched += 1
        return PassReport(name=self.name, matched=matched)


def _sizes(node: ir.Node) -> tuple[int | str | None, ...] | None:
    """What the Shape gives."""
    sizes = dimensions(node.inputs[0])
    # Source: ONNX Shape-15: start and end count from the end if negative and are clamped, as in Python.
    end = node.attributes.get_int("end") if "end" in node.attributes else None
    return None if sizes is None else sizes[node.attributes.get_int("start", 0) : end]
