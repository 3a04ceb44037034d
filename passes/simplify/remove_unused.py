"""Remove what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from sdc.passes.base import Pass, PassReport


@dataclass(frozen=True)
class RemoveUnused(Pass):
    """Every node, initialiser, function and operator set of the model is needed for an output.

    Before → after::

        y = f(x), z = g(x), outputs [y]  →  y = f(x)

    Graph inputs stay, used or not: they are the component's interface.
    """

    name: ClassVar[str] = "remove-unused"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Remove; the match count is the number of nodes, initialisers and functions that went."""
        before = _sizes(model)
        RemoveUnusedNodesPass()(model)
        RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        RemoveUnusedOpsetsPass()(model)
        removed = {kind: before[kind] - size for kind, size in _sizes(model).items()}
        return PassReport(name=self.name, matched=sum(removed.values()), details=removed)


def _sizes(model: ir.Model) -> dict[str, int]:
    return {
        "nodes": len(model.graph),
        "initializers": len(model.graph.initializers),
        "functions": len(model.functions),
    }
