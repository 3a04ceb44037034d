"""Ask for no output that nothing reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.base import Pass, PassReport


@dataclass(frozen=True)
class OmitOutputs(Pass):
    """Optional outputs that nothing reads are omitted, so that they are neither computed nor written.

    Before → after, y2 and y4 unread::

        y1, y2, y3, y4 = f(x)  →  y1, , y3 = f(x)

    Preconditions:

    1. The operator is of one of `domains`, in which all outputs but the first are optional.

    Comes after the last pass that gives names: an output with a name is asked for.

    Attributes:
        domains: operator domains.
    """

    domains: frozenset[str]
    name: ClassVar[str] = "omit-outputs"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Omit; the match count is the number of outputs."""
        matched = 0
        for node in model.graph:
            if node.domain not in self.domains:
                continue
            read = [bool(value.uses()) or value.is_graph_output() for value in node.outputs]
            last = max((index for index, each in enumerate(read) if each), default=0)
            matched += len(node.outputs) - 1 - last
            node.resize_outputs(last + 1)
            for value, each in list(zip(node.outputs, read, strict=False))[1:]:
                if not each:
                    value.name = ""
                    matched += 1
        return PassReport(name=self.name, matched=matched)
