"""Remove chains of data movement that undo each other, and operators that do nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass
from onnxscript.rewriter import RewriteRule, RewriteRuleSet
from onnxscript.rewriter.rules import common

from sdc.passes.base import Pass, PassReport

_RULES: dict[str, RewriteRule] = {
    "cast": common.no_op_cast_rule,
    "cast_cast": common.cast_cast_rule,
    "transpose": common.no_op_transpose_rule,
    "transpose_transpose": common.transpose_transpose_rule,
    "reshape_reshape": common.reshape_reshape_rule,
    "squeeze_reshape": common.squeeze_reshape_1d_rule,
    "unsqueeze_unsqueeze": common.unsqueeze_unsqueeze_rule,
}


@dataclass(frozen=True)
class CancelNoOps(Pass):
    """Data movement is as short as it can be.

    Before → after::

        Cast(x), to x's type                              →  x
        Cast(Cast(x, float32), float16 or bfloat16)       →  Cast(x, float16 or bfloat16)
        Transpose(x), in the order that x has             →  x
        Transpose(Transpose(x, p), q)                     →  Transpose(x, p∘q), or x
        Reshape(Reshape(x, s), t), t constant             →  Reshape(x, t)
        Reshape(Squeeze(x), [-1]), x of rank 1            →  x
        Unsqueeze(Unsqueeze(x, a), b)                     →  Unsqueeze(x, [a, b])
        Identity(x)                                       →  x

    Preconditions are those of onnxscript's rules of these names; nothing else reads what stands between two operators
    that are merged. Casts that lose precision on the way (float32 →
    float16 → float32) stay.

    Not matched: arithmetic with neutral elements; the exporter leaves none, and dropping a broadcast changes shapes.
    """

    name: ClassVar[str] = "cancel-no-ops"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Apply all rules until none matches; the details count matches per rule."""
        counts = dict.fromkeys([*_RULES, "identity"], 0)
        while True:
            found = {name: RewriteRuleSet([rule]).apply_to_model(model) for name, rule in _RULES.items()}
            before = len(model.graph)
            IdentityEliminationPass()(model)
            for name, count in found.items():
                counts[name] += count
            counts["identity"] += before - len(model.graph)
            if not any(found.values()):
                break
        # Every rule that ends in "x" leaves an Identity behind: count it once.
        matched = sum(counts[name] for name in _RULES)
        return PassReport(name=self.name, matched=matched, details={name: n for name, n in counts.items() if n})
