"""An order of a graph's steps in which less lives at the same time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdc.engines.errors import PassError
from sdc.passes.memory.buffers import SizedGraph
from sdc.passes.memory.lifetimes import lower_bound


def reorder_steps(graph: SizedGraph) -> SizedGraph:
    """The same graph with its steps in the best order that was found; its lower bound is never above that of `graph`.

    Two orders are tried beside the present one: from the front, each time the step that leaves the least alive, of
    those whose operands are there; and the same from the back, which decides with the outputs in view. Finding the best
    order of all is NP-hard.

    Raises:
        PassError: a buffer is written by several steps, as in a graph that writes in place: that is of one order.

    Source: list scheduling. The problem: Sethi, "Complete Register Allocation Problems", 1975; Liu, "An Application of
    Generalized Tree Pebbling to Sparse Matrix Factorization", 1987.
    """
    writes = Counter(buffer for step in graph.steps for buffer in step.writes)
    if writes and max(writes.values()) > 1:
        raise PassError(
            f"{graph.names[writes.most_common(1)[0][0]]!r} is written by several steps, expected one",
            hint="reorder the steps before they write in place",
        )
    orders = [range(len(graph.steps)), _greedy_order(_forward(graph)), _greedy_order(_backward(graph))[::-1]]
    candidates = [replace(graph, steps=tuple(graph.steps[index] for index in order)) for order in orders]
    return min(candidates, key=lower_bound)  # of equals, the first


@dataclass(frozen=True)
class _Direction:
    """A graph as it looks to one who walks through it from one end.

    A step can be passed once all that make what it needs were passed. A buffer lives from the first step that makes it
    until all that need it were passed.

    Attributes:
        needs: buffers, by step; likewise ``makes``.
        kept: buffers that live on for ever.
        alive: those that live before the first step.
        bytes: of each buffer.
        ranks: of each step, to decide between equals.
    """

    needs: Sequence[tuple[int, ...]]
    makes: Sequence[tuple[int, ...]]
    kept: frozenset[int]
    alive: frozenset[int]
    bytes: Sequence[int]
    ranks: Sequence[int]


def _forward(graph: SizedGraph) -> _Direction:
    return _Direction(
        needs=[step.reads for step in graph.steps],
        makes=[step.writes for step in graph.steps],
        kept=graph.outputs,
        alive=frozenset(),
        bytes=graph.bytes,
        ranks=range(len(graph.steps)),
    )


def _backward(graph: SizedGraph) -> _Direction:
    """From the back, a buffer's readers come before its writer."""
    return _Direction(
        needs=[step.writes for step in graph.steps],
        makes=[step.reads for step in graph.steps],
        kept=frozenset(),
        alive=graph.outputs,
        bytes=graph.bytes,
        ranks=range(0, -len(graph.steps), -1),
    )


def _greedy_order(way: _Direction) -> list[int]:
    """All steps, each the one that leaves the least alive of those that can be passed."""
    makers = Counter(buffer for made in way.makes for buffer in made)
    needers = Counter(buffer for needed in way.needs for buffer in needed)
    waiting = {step: {each for each in needed if makers[each]} for step, needed in enumerate(way.needs)}
    users: dict[int, list[int]] = defaultdict(list)
    for step, needed in enumerate(way.needs):
        for buffer in needed:
            users[buffer].append(step)
    alive, order = set(way.alive), list[int]()

    def cost(step: int) -> tuple[int, int, int]:
        needed, made = way.needs[step], way.makes[step]
        new = sum(way.bytes[each] for each in made if each not in alive)
        held = {each for each in needed if each in alive} | set(made)
        freed = {each for each in held - way.kept if needers[each] == (each in needed)}
        return new - sum(way.bytes[each] for each in freed), new, way.ranks[step]

    ready = {step for step, missing in waiting.items() if not missing}
    while ready:
        step = min(ready, key=cost)
        ready.remove(step)
        order.append(step)
        alive.update(way.makes[step])
        makers.subtract(way.makes[step])
        needers.subtract(way.needs[step])
        for buffer in way.makes[step]:
            for reader in () if makers[buffer] else users[buffer]:
                waiting[reader].discard(buffer)
                ready.update(() if waiting[reader] else (reader,))
    return order
