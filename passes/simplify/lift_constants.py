"""Turn Constant nodes into initialisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveInitializersFromInputsPass

from sdc.passes.base import Pass, PassReport


@dataclass(frozen=True)
class LiftConstants(Pass):
    """All constants of the main graph are initialisers, and no initialiser can be overridden by a feed.

    Before → after::

        c = Constant(value)                          →  initialiser c = value
        initialiser w that is a graph input as well  →  initialiser w

    Not matched: Constant nodes whose output is an output of the graph; constants in bodies of functions.
    """

    name: ClassVar[str] = "lift-constants"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Lift; the match count is the number of new initialisers."""
        before = len(model.graph.initializers)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        RemoveInitializersFromInputsPass()(model)
        return PassReport(name=self.name, matched=len(model.graph.initializers) - before)
