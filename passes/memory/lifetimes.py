"""When buffers live, and the least memory that could hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sdc.passes.memory.buffers import SizedGraph, Step


@dataclass(frozen=True)
class Lifetime:
    """A buffer and the steps between which it must not be overwritten.

    Attributes:
        name: of the buffer.
        bytes: its size.
        begin: number of the step that writes it first.
        end: number of the last step that needs it, itself included.
    """

    name: str
    bytes: int
    begin: int
    end: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both live at some step."""
        return self.begin <= other.end and other.begin <= self.end


def lifetimes_of(graph: SizedGraph) -> tuple[Lifetime, ...]:
    """The lifetime of every buffer of `graph`, in its order; one that nothing reads lives while it is written."""
    begin, end = _ends(graph)
    return tuple(
        Lifetime(name, size, first, last)
        for name, size, first, last in zip(graph.names, graph.bytes, begin, end, strict=True)
        if first >= 0
    )


def live_bytes(lifetimes: Sequence[Lifetime], steps: int) -> NDArray[np.int64]:
    """[steps], int64: bytes of the buffers that live at each step."""
    change = np.zeros(steps + 1, np.int64)
    for each in lifetimes:
        change[each.begin] += each.bytes
        change[each.end + 1] -= each.bytes
    return change.cumsum()[:-1]


def lower_bound(graph: SizedGraph) -> int:
    """Bytes without which no arrangement of the buffers can do, in this order of the steps.

    It is the most that lives at one step: the "offset calculation lower bound".

    Source: Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020 (arXiv:2001.03288).
    """
    return int(live_bytes(lifetimes_of(graph), len(graph.steps)).max(initial=0))


def write_in_place(graph: SizedGraph) -> SizedGraph:
    """The same graph with results of element-wise steps where an operand of theirs was, in this order of the steps.

    An operand is overwritten if it is as large as the result, no output of the graph, and no later step reads it. The
    result holds in this order alone: it must not be reordered.
    """
    _, end = _ends(graph)
    home = list(range(len(graph.bytes)))
    steps: list[Step] = []
    for number, step in enumerate(graph.steps):
        for operand in step.overwrites:
            (result,) = step.writes
            root = home[operand]
            if end[root] == number and graph.bytes[root] == graph.bytes[result]:
                home[result] = root
                end[root] = end[result]
                break
        reads, writes = (tuple(dict.fromkeys(home[each] for each in part)) for part in (step.reads, step.writes))
        steps.append(replace(step, reads=reads, writes=writes, overwrites=()))
    return replace(graph, steps=tuple(steps), outputs=frozenset(home[each] for each in graph.outputs))


def _ends(graph: SizedGraph) -> tuple[list[int], list[int]]:
    """By buffer, the steps that write it first and need it last; -1 for one that no step writes."""
    begin, end = [-1] * len(graph.bytes), [-1] * len(graph.bytes)
    for number, step in enumerate(graph.steps):
        for buffer in step.writes:
            begin[buffer] = number if begin[buffer] < 0 else begin[buffer]
        for buffer in (*step.writes, *step.reads):
            end[buffer] = number
    for buffer in graph.outputs:
        end[buffer] = len(graph.steps) - 1
    return begin, end
