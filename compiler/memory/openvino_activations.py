"""The activations of an engine as OpenVINO's session has them in memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from sdc.passes.memory.buffers import SizedGraph, Step

_NORM = "InstanceNormalization"
"""What a group norm is for OpenVINO."""


def as_openvino_holds(graph: SizedGraph, sums: Collection[str] = ()) -> SizedGraph:
    """The graph with what the session does otherwise.

    1. Outputs leave for tensors of the caller's type as they are written, so no buffer is held for them to the end, and
       none for what a Cast makes of them that nothing else reads.
    2. Sums of `sums` are computed with the norm behind them: both operands, the sum and the normalised images are in
       memory together, and none in another's place.

    Args:
        graph: in the order in which it runs.
        sums: names of buffers, from `sums_taken`.
    """
    leaving = graph.outputs - {buffer for step in graph.steps for buffer in step.reads}
    steps = [step for step in graph.steps if step.operator != "Cast" or not leaving.issuperset(step.writes)]
    for number, step in enumerate(steps):
        if step.operator == "Add" and graph.names[step.writes[0]] in sums:
            norm = _reader(steps, number)
            if norm is not None:
                steps[number] = Step(_NORM, step.reads, (*step.writes, *steps.pop(norm).writes))
    return replace(graph, steps=tuple(steps), outputs=frozenset())


def _reader(steps: list[Step], number: int) -> int | None:
    """The norm that reads what a step wrote."""
    (written,) = steps[number].writes
    later = range(number + 1, len(steps))
    return next((each for each in later if steps[each].operator == _NORM and written in steps[each].reads), None)
