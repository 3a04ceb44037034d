"""Inline model-local functions: the exporter's before matching, the fused ones when a target is lowered to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Calls of model-local functions become the nodes of their bodies.

    Before → after::

        y = f(x), f(x) = g(h(x))  →  y = g(h(x))

    Preconditions: functions do not call themselves, directly or through others.

    Not matched: operators of domain `sdc`, unless `fused` is set.

    Attributes:
        fused: inline the operators of domain `sdc` too; no function is left.
    """

    fused: bool = False
    name: ClassVar[str] = "inline-functions"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Inline; the details count the calls per function."""
        result = InlinePass(criteria=None if self.fused else _is_foreign)(model)
        # The inliner's result says how often each function was called.
        calls = {f"{name[0]}.{name[1]}": count for name, count in sorted(getattr(result, "id_count", {}).items())}
        if self.fused:
            model.graph.opset_imports.pop(domain.DOMAIN, None)
        return PassReport(name=self.name, matched=sum(calls.values()), details={"calls": calls})


def _is_foreign(function: ir.Function) -> bool:
    return function.domain != domain.DOMAIN
