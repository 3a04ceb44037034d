"""Lifetimes, arenas and orders of steps on random graphs, and by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from random_buffers import buffer_graphs, run_in_arena

from sdc.engines.errors import InputError, PassError
from sdc.passes.memory.arena import Arena, place_buffers
from sdc.passes.memory.buffers import ALIGNMENT, Buffer, BufferGraph, SizedGraph, Step
from sdc.passes.memory.lifetimes import Lifetime, lifetimes_of, live_bytes, lower_bound, write_in_place
from sdc.passes.memory.plan import plan_memory
from sdc.passes.memory.reorder import reorder_steps

RANDOM = settings(max_examples=300, deadline=None, derandomize=True)


def units(*sizes: int) -> tuple[int, ...]:
    return tuple(ALIGNMENT * size for size in sizes)


def graph_of(sizes: tuple[int, ...], steps: list[tuple[tuple[int, ...], tuple[int, ...]]], *outputs: int) -> SizedGraph:
    names = tuple(f"v{index}" for index in range(len(sizes)))
    made = tuple(Step("Any", reads, writes) for reads, writes in steps)
    return SizedGraph(names, units(*sizes), made, frozenset(outputs))


TWO_BRANCHES = graph_of(
    (1, 9, 9, 2, 2, 1), [((), (0,)), ((0,), (1,)), ((0,), (2,)), ((1,), (3,)), ((2,), (4,)), ((3, 4), (5,))], 5
)
"""Both branches grow before either shrinks."""


@RANDOM
@given(buffer_graphs())
def test_nothing_that_lives_is_overwritten(graph: SizedGraph) -> None:
    plan = plan_memory(graph)
    for each in (plan.written, plan.reordered):
        run_in_arena(replace(graph, steps=each.steps), each.arena)


@RANDOM
@given(buffer_graphs())
def test_lifetimes_that_meet_do_not_overlap_and_bounds_hold(graph: SizedGraph) -> None:
    plan = plan_memory(graph)
    for each in (plan.written, plan.reordered):
        placed = list(zip(each.lifetimes, each.arena.offsets, strict=True))
        for number, (life, offset) in enumerate(placed):
            for other, place in placed[:number]:
                apart = offset + life.bytes <= place or place + other.bytes <= offset
                assert apart or not life.meets(other), f"{life} at {offset} and {other} at {place}"
        assert each.lower_bound_bytes <= each.arena.bytes <= plan.naive_bytes
    assert plan.reordered.arena.bytes <= plan.written.arena.bytes


@RANDOM
@given(buffer_graphs())
def test_the_lower_bound_is_what_lives_at_the_fullest_step(graph: SizedGraph) -> None:
    fullest = 0
    for number, step in enumerate(graph.steps):
        written = {each for earlier in graph.steps[: number + 1] for each in earlier.writes}
        needed = {each for later in graph.steps[number:] for each in later.reads} | graph.outputs
        alive = (written & needed) | set(step.writes)
        fullest = max(fullest, sum(graph.bytes[each] for each in alive))
    assert lower_bound(graph) == fullest


@RANDOM
@given(buffer_graphs())
def test_reordered_steps_are_the_same_ones_after_their_operands(graph: SizedGraph) -> None:
    reordered = reorder_steps(graph)
    assert Counter(reordered.steps) == Counter(graph.steps)
    assert lower_bound(reordered) <= lower_bound(graph)
    written: set[int] = set()
    for step in reordered.steps:
        assert set(step.reads) <= written
        written.update(step.writes)
    assert reorder_steps(graph) == reordered


@RANDOM
@given(buffer_graphs())
def test_results_in_place_of_operands_are_read_whole(graph: SizedGraph) -> None:
    shared = write_in_place(graph)
    lifetimes = lifetimes_of(shared)
    arena = place_buffers(lifetimes)
    # What is written in another's place has no lifetime of its own.
    offsets = {each.name: offset for each, offset in zip(lifetimes, arena.offsets, strict=True)}
    places = Arena(tuple(offsets.get(name, 0) for name in shared.names), arena.bytes)
    run_in_arena(shared, places, tuple(step.writes for step in graph.steps))
    assert lower_bound(shared) <= lower_bound(graph)


@RANDOM
@given(buffer_graphs())
def test_plans_in_place_need_no_more_than_others_and_keep_their_order(graph: SizedGraph) -> None:
    plan, plain = plan_memory(graph, in_place=True), plan_memory(graph)
    assert plan.naive_bytes == plain.naive_bytes
    assert plan.written.lower_bound_bytes <= plain.written.lower_bound_bytes
    assert plan.reordered.arena.bytes <= plan.written.arena.bytes
    # Every step is there, and reads what was written before it.
    for each in (plan.written, plan.reordered):
        written: set[int] = set()
        for step in each.steps:
            assert set(step.reads) <= written
            written.update(step.writes)
    assert plan.reordered.lower_bound_bytes >= max(graph.bytes)


def test_steps_that_write_in_place_are_not_reordered() -> None:
    steps = (Step("Any", (), (0,)), Step("Relu", (0,), (1,), (0,)), Step("Any", (1,), (2,)))
    graph = write_in_place(SizedGraph(("a", "b", "c"), units(4, 4, 1), steps, frozenset({2})))
    with pytest.raises(PassError, match="'a' is written by several steps, expected one; reorder the steps before"):
        plan_memory(graph)


def test_two_branches_by_hand() -> None:
    lifetimes = lifetimes_of(TWO_BRANCHES)
    assert [(each.begin, each.end) for each in lifetimes] == [(0, 2), (1, 3), (2, 4), (3, 5), (4, 5), (5, 5)]
    assert live_bytes(lifetimes, 6).tolist() == [ALIGNMENT * each for each in (1, 10, 19, 20, 13, 5)]
    plan = plan_memory(TWO_BRANCHES)
    assert plan.naive_bytes == ALIGNMENT * 24
    assert plan.written.lower_bound_bytes == plan.written.arena.bytes == ALIGNMENT * 20
    # One branch to its end before the other begins: the second large buffer meets the first branch's result alone.
    assert plan.reordered.lower_bound_bytes == plan.reordered.arena.bytes == ALIGNMENT * 13
    assert [step.writes for step in plan.reordered.steps] == [(0,), (1,), (3,), (2,), (4,), (5,)]


def test_a_good_order_stays_as_it_is() -> None:
    chain = graph_of((3, 2, 5), [((), (0,)), ((0,), (1,)), ((1,), (2,))], 2)
    plan = plan_memory(chain)
    assert plan.reordered == plan.written
    assert plan.written.arena.bytes == ALIGNMENT * 7


def test_an_order_with_less_alive_but_a_larger_arena_is_not_taken() -> None:
    steps = [((), (0, 1)), ((0, 1), (2,)), ((2,), (3, 4)), ((1, 4), (5,)), ((2,), (6,))]
    graph = graph_of((10, 4, 10, 3, 8, 12, 6), steps, 6)
    reordered = reorder_steps(graph)
    assert (lower_bound(graph), lower_bound(reordered)) == units(34, 31)
    assert place_buffers(lifetimes_of(reordered)).bytes == ALIGNMENT * 38
    plan = plan_memory(graph)
    assert plan.reordered == plan.written
    assert plan.written.arena.bytes == ALIGNMENT * 34


def test_the_tightest_gap_is_taken() -> None:
    rows = [
        ("low", 10, 0, 0),
        ("a", 9, 0, 1),
        ("hole", 8, 0, 0),
        ("b", 7, 0, 1),
        ("wide", 6, 1, 1),
        ("filler", 2, 1, 1),
    ]
    arena = place_buffers([Lifetime(name, ALIGNMENT * size, begin, end) for name, size, begin, end in rows])
    # At step 1 there are gaps of 10 and 8 below a and b; then of 10 and 2.
    assert arena.offsets == units(0, 10, 19, 27, 19, 25)
    assert arena.bytes == ALIGNMENT * 34


def test_the_fullest_step_goes_first_where_that_is_better() -> None:
    rows = [("a", 4, 2, 3), ("b", 4, 1, 2), ("c", 2, 3, 4), ("d", 3, 3, 3)]
    lifetimes = [Lifetime(name, ALIGNMENT * size, begin, end) for name, size, begin, end in rows]
    # By size, b lies below a, and c fits only above both. Step 3 is the fullest: a, d and c go first.
    assert live_bytes(lifetimes, 5).max() == ALIGNMENT * 9
    assert place_buffers(lifetimes).bytes == ALIGNMENT * 9


def test_outputs_live_to_the_end_and_unread_results_while_they_are_written() -> None:
    graph = graph_of((1, 2, 3), [((), (0, 1)), ((), (2,))], 0)
    assert [(each.begin, each.end) for each in lifetimes_of(graph)] == [(0, 1), (0, 0), (1, 1)]


def test_an_output_is_not_overwritten_in_place() -> None:
    steps = (Step("Any", (), (0,)), Step("Relu", (0,), (1,), (0,)), Step("Any", (1,), (2,)))
    graph = SizedGraph(("a", "b", "c"), units(4, 4, 1), steps, frozenset({2}))
    assert lower_bound(graph) == ALIGNMENT * 8
    assert lower_bound(write_in_place(graph)) == ALIGNMENT * 5
    assert lower_bound(write_in_place(replace(graph, outputs=frozenset({0, 2})))) == ALIGNMENT * 9
    later = replace(graph, steps=(*steps[:2], Step("Any", (0, 1), (2,))))
    assert write_in_place(later).steps[1].writes == (1,)
    twice = replace(graph, steps=(*steps[:2], Step("Relu", (1,), (2,), (1,))), bytes=units(4, 4, 4))
    assert lower_bound(write_in_place(twice)) == ALIGNMENT * 4
    unequal = replace(graph, bytes=units(4, 3, 1))
    assert write_in_place(unequal).steps[1].writes == (1,)


def test_sizes_are_rounded_up_and_types_may_be_others() -> None:
    count = ir.SymbolicDim("3*B*H")
    buffers = (
        Buffer("x", count, ir.DataType.FLOAT),
        Buffer("q", count, ir.DataType.INT4),
        Buffer("s", 1, ir.DataType.INT64),
    )
    graph = BufferGraph((buffers[0],), buffers, (), (), 0)
    sizes = {"B": 5, "H": 7}
    assert graph.at(sizes).bytes == (448, 64, 64)
    assert graph.at(sizes).input_bytes == 3 * 5 * 7 * 4
    assert [each.bytes_at(sizes) for each in buffers] == [420, 53, 8]
    assert graph.at(sizes, floating_bits=16).bytes == (256, 64, 64)
    with pytest.raises(InputError, match=r"no size for \['H'\] of 'x'"):
        graph.at({"B": 5})
