"""Refuse a lowered graph that holds anything but what its backend reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes.base import Pass, PassReport


@dataclass(frozen=True)
class CheckOperators(Pass):
    """The graph is unchanged; every operator is of one of `domains` and no model-local function is left.

    Attributes:
        domains: operator domains that the backend reads; "" is ONNX's own.
    """

    domains: frozenset[str] = frozenset({""})
    name: ClassVar[str] = "check-operators"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Check.

        Raises:
            PassError: an operator of another domain or a function is left.
        """
        foreign = Counter(f"{node.domain}.{node.op_type}" for node in model.graph if node.domain not in self.domains)
        if foreign or model.functions:
            functions = [f"{domain}.{name}" for domain, name, _ in model.functions]
            raise PassError(
                f"the backend reads operators of domains {sorted(self.domains)} and no functions, found "
                f"operators {dict(foreign)} and functions {functions}",
                hint="lower every operator that a fusion introduces",
            )
        return PassReport(name=self.name, matched=0)
