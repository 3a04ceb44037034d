"""Recognise a Split that is written as Slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import FLOATS, constant, dimensions, is_operator, replace_by_several, site


@dataclass(frozen=True)
class RaiseSplit(Pass):
    """Two Slices that halve an axis are one Split.

    The TorchScript exporter writes torch's ``chunk`` so, in the gated feed-forward layers.

    Before → after::

        a = Slice(x, 0, n, axis), b = Slice(x, n, 2n, axis)  →  a, b = Split(x), axis, num_outputs = 2

    Preconditions:

    1. Both slice the same value along the same one axis, which has a known even size, with step 1 and known bounds.
    2. One takes the first half and the other the second.

    Not matched: other fractions, which no network here holds.
    """

    name: ClassVar[str] = "raise-split"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all pairs; Slices of half an axis without their counterpart are reported as skipped."""
        halves: dict[tuple[ir.Value, int], dict[int, ir.Node]] = {}
        for node in model.graph:
            if is_operator(node, "Slice") and (found := _half(node)) is not None:
                axis, half = found
                assert node.inputs[0] is not None
                halves.setdefault((node.inputs[0], axis), {}).setdefault(half, node)
        matched = 0
        skipped: list[Skipped] = []
        for (value, axis), pair in halves.items():
            if len(pair) < 2:
                skipped.append(Skipped(site(*pair.values()), "the other half of the axis is not sliced"))
                continue
            split = ir.node("Split", [value], {"axis": axis, "num_outputs": 2}, num_outputs=2)
            first, outputs = next(iter(pair.values())), [pair[half].outputs[0] for half in (0, 1)]
            replace_by_several(list(pair.values()), [split], outputs, list(split.outputs), at=first)
            matched += 1
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))


def _half(node: ir.Node) -> tuple[int, int] | None:
    """Axis, and 0 or 1 for the half of it that a Slice takes; None for other Slices."""
    shape = dimensions(node.inputs[0])
    bounds = [constant(value) for value in node.inputs[1:]]
    if (
        shape is None
        or node.outputs[0].dtype not in FLOATS
        or any(bound is None or bound.size != 1 for bound in bounds)
        or len(bounds) < 3
    ):
        return None
    start, end, axis, step = [int(bound.item()) for bound in bounds if bound is not None] + [1] * (4 - len(bounds))
    size = shape[axis]
    if not isinstance(size, int) or size % 2 or step != 1:
        return None
    taken = range(size)[start:end]
    for half in (0, 1):
        if taken == range(half * size // 2, (half + 1) * size // 2):
            return axis % len(shape), half
    return None
