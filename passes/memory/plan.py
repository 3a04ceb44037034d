"""The memory plan of a graph at given sizes."""

from __future__ import annotations

from dataclasses import dataclass

from sdc.passes.memory.arena import Arena, place_buffers
from sdc.passes.memory.buffers import SizedGraph, Step
from sdc.passes.memory.lifetimes import Lifetime, lifetimes_of, lower_bound, write_in_place
from sdc.passes.memory.reorder import reorder_steps


@dataclass(frozen=True)
class Arrangement:
    """The buffers of a graph in one order of its steps.

    Attributes:
        steps: in that order.
        lifetimes: of all buffers.
        arena: their places, in the order of the lifetimes.
        lower_bound_bytes: what no arrangement of this order can go below.
    """

    steps: tuple[Step, ...]
    lifetimes: tuple[Lifetime, ...]
    arena: Arena
    lower_bound_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What the activations of a graph take, its inputs aside.

    Attributes:
        naive_bytes: every buffer has memory of its own.
        written: shared, in the order of the graph.
        reordered: shared, in the order that needs least of those tried; its bytes are never above those of ``written``.
        input_bytes: of the graph's inputs.
    """

    naive_bytes: int
    written: Arrangement
    reordered: Arrangement
    input_bytes: int


def plan_memory(graph: SizedGraph, *, in_place: bool = False) -> MemoryPlan:
    """Work out the plan; equal graphs give equal plans.

    Args:
        graph: every buffer is written by one step.
        in_place: whether element-wise steps write over operands that nothing else needs, see `write_in_place`.

    Raises:
        PassError: a buffer is written by several steps.
    """
    written = _arrange(graph, in_place)
    reordered = _arrange(reorder_steps(graph), in_place)
    return MemoryPlan(
        naive_bytes=sum(graph.bytes),
        written=written,
        reordered=min((written, reordered), key=lambda each: each.arena.bytes),
        input_bytes=graph.input_bytes,
    )


def _arrange(graph: SizedGraph, in_place: bool) -> Arrangement:
    graph = write_in_place(graph) if in_place else graph
    lifetimes = lifetimes_of(graph)
    return Arrangement(graph.steps, lifetimes, place_buffers(lifetimes), lower_bound(graph))
