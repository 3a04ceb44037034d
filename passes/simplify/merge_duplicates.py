"""Share what is computed or stored twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateInitializersPass

from sdc.passes.base import Pass, PassReport


@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Equal small initialisers and equal nodes exist once.

    Before → after::

        initialisers a = b                      →  a
        y = f(x), z = f(x), same attributes     →  y

    Preconditions:

    1. Initialisers have equal type, shape and bytes, and at most `size_limit` elements: shape vectors and scalars.
    2. Nodes are deterministic and hold no subgraph.

    Not matched: weights, which are equal only where the network ties them, and the exporter keeps those tied.

    Attributes:
        size_limit: largest initialiser to compare, in elements.
    """

    size_limit: int = 64
    name: ClassVar[str] = "merge-duplicates"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Merge; the match count is the number of initialisers and nodes that went."""
        initializers, nodes = len(model.graph.initializers), len(model.graph)
        DeduplicateInitializersPass(size_limit=self.size_limit)(model)
        CommonSubexpressionEliminationPass()(model)
        merged = {"initializers": initializers - len(model.graph.initializers), "nodes": nodes - len(model.graph)}
        return PassReport(name=self.name, matched=sum(merged.values()), details=merged)
