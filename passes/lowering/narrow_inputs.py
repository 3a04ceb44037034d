"""Take inputs in the type that the graph computes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.base import Pass, PassReport
from sdc.passes.matching import consumers, dimensions, is_operator


@dataclass(frozen=True)
class NarrowInputs(Pass):
    """An input that is cast to float16 before anything reads it is fed in float16.

    Before → after, x an input::

        y = Cast(x), float32 to float16   →  x is float16, y = x

    Whoever feeds the graph rounds the input, to the same values; what is hoisted out of a UNet stays the same for many
    runs. A sample changes with every run, and a GPU casts it faster.

    Preconditions:

    1. All that reads x are such casts.
    2. x is no output, and no image (rank 4 with a free height or width).

    Not matched: inputs that something reads in float32, images.
    """

    name: ClassVar[str] = "narrow-inputs"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Narrow all inputs that can be."""
        narrowed = 0
        for value in model.graph.inputs:
            readers = consumers(value)
            casts = [node for node in readers if is_operator(node, "Cast")]
            to_half = all(node.outputs[0].dtype == ir.DataType.FLOAT16 for node in casts)
            if value.dtype != ir.DataType.FLOAT or not casts or len(casts) < len(readers) or not to_half:
                continue
            if _is_image(value) or value.is_graph_output() or any(node.outputs[0].is_graph_output() for node in casts):
                continue
            value.type = ir.TensorType(ir.DataType.FLOAT16)
            for node in casts:
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
                model.graph.remove(node, safe=True)
            narrowed += 1
        return PassReport(self.name, narrowed)


def _is_image(value: ir.Value) -> bool:
    sizes = dimensions(value)
    return sizes is None or (len(sizes) == 4 and not all(isinstance(size, int) for size in sizes[2:]))
