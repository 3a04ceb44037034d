"""Compute at compile time what depends on constants alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from sdc.passes.base import Pass, PassReport


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Nodes with constant operands are replaced by their results, within size limits.

    Before → after::

        y = f(c1, c2, ...)  →  initialiser y

    Preconditions:

    1. Every operand is an initialiser of at most `input_size_limit` elements.
    2. The result has at most `output_size_limit` elements, or no more than the operands that nothing else reads.
    3. The operator is deterministic.

    Shape arithmetic on partly known shapes is simplified as well (onnxscript's partial evaluation).

    Attributes:
        input_size_limit: largest operand, in elements. Weights are above it: a folded transpose of a large weight would
            be a second copy of it in memory.
        output_size_limit: largest result, in elements: 77 x 77 masks and embedding tables of positions fit.
    """

    input_size_limit: int = 8192
    output_size_limit: int = 65536
    name: ClassVar[str] = "fold-constants"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Fold; the match count is the number of nodes that went."""
        before = len(model.graph)
        fold_constants(
            model,
            onnx_shape_inference=False,
            input_size_limit=self.input_size_limit,
            output_size_limit=self.output_size_limit,
        )
        return PassReport(name=self.name, matched=before - len(model.graph))
