"""Random graphs of buffers, and a machine that runs a plan and sees every overwritten byte."""

from __future__ import annotations

from hypothesis import strategies

from sdc.passes.memory.arena import Arena
from sdc.passes.memory.buffers import ALIGNMENT, SizedGraph, Step


@strategies.composite
def buffer_graphs(draw: strategies.DrawFn) -> SizedGraph:
    """Graphs of up to 24 steps, each of which reads any earlier buffers and writes one to three."""
    steps: list[Step] = []
    sizes: list[int] = []
    for _ in range(draw(strategies.integers(1, 24))):
        present = strategies.integers(0, len(sizes) - 1) if sizes else strategies.nothing()
        reads = draw(strategies.lists(present, max_size=3, unique=True)) if sizes else []
        count = draw(strategies.sampled_from([1, 1, 1, 2, 3]))
        writes = range(len(sizes), len(sizes) + count)
        sizes += [ALIGNMENT * draw(strategies.integers(0, 9)) for _ in writes]
        over = reads if count == 1 and draw(strategies.booleans()) else []
        steps.append(Step("Any", tuple(reads), tuple(writes), tuple(over)))
    outputs = draw(strategies.sets(strategies.integers(0, len(sizes) - 1), min_size=1, max_size=3))
    names = tuple(f"v{index}" for index in range(len(sizes)))
    return SizedGraph(names, tuple(sizes), tuple(steps), frozenset(outputs))


def run_in_arena(graph: SizedGraph, arena: Arena, results: tuple[tuple[int, ...], ...] | None = None) -> None:
    """Run the steps on a memory whose units remember who wrote them; fail where a reader finds something else.

    Args:
        graph: its buffers lie at the arena's offsets.
        arena: of this graph.
        results: by step, what it is to write; its buffers' own numbers if None. Readers look for what was written last.
    """
    memory: list[object] = [None] * (arena.bytes // ALIGNMENT)
    inside: dict[int, object] = {}

    def region(buffer: int) -> slice:
        begin = arena.offsets[buffer] // ALIGNMENT
        return slice(begin, begin + graph.bytes[buffer] // ALIGNMENT)

    def check(buffer: int, place: str) -> None:
        units = memory[region(buffer)]
        assert len(units) * ALIGNMENT == graph.bytes[buffer], f"{place}: buffer {buffer} leaves the arena"
        assert all(unit == inside[buffer] for unit in units), f"{place}: buffer {buffer} was overwritten"

    for number, step in enumerate(graph.steps):
        fresh = [buffer for buffer in step.writes if buffer not in step.reads]
        for index, buffer in enumerate(step.writes):
            if buffer in fresh:
                inside[buffer] = buffer if results is None else results[number][index]
                memory[region(buffer)] = [inside[buffer]] * (graph.bytes[buffer] // ALIGNMENT)
        for buffer in step.reads:
            check(buffer, f"step {number}")  # after the results are written: a kernel does both by and by
        for index, buffer in enumerate(step.writes):
            if buffer not in fresh:
                inside[buffer] = buffer if results is None else results[number][index]
                memory[region(buffer)] = [inside[buffer]] * (graph.bytes[buffer] // ALIGNMENT)
    for buffer in graph.outputs:
        check(buffer, "the end")
