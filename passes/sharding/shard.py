"""shard: a graph in several that run one after another, each with a part of the weights.

With s_i the nodes between two cuts of the graph's order and c_i what they hand on,

    f(x)  =  s_n(x, c_1 … c_{n-1})        c_i = s_i(x, c_1 … c_{i-1})

only one s_i and the c_j that are still needed have to be in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from sdc.engines.errors import InputError, PassError
from sdc.passes.base import PassReport, run_passes
from sdc.passes.hoisting.crossing import describe, free_names, give_out, read_sizes_of, take_in
from sdc.passes.hoisting.hoist_split import TIDYING
from sdc.passes.matching import is_operator
from sdc.passes.sharding.choose_cuts import choose_cuts
from sdc.passes.sharding.waists import Line, MayCross, find_waists, line_up, weight_bytes_between

CROSSING = "shard"
"""What tensors that cross are called, with a number behind it."""


@dataclass(frozen=True)
class Sharded:
    """A graph in pieces.

    Attributes:
        models: in the order in which they run.
        report: as of a pass; the number matched is that of the cuts. Details have figures of each piece.
    """

    models: tuple[ir.Model, ...]
    report: PassReport


def shard(model: ir.Model, count: int, *, sizes: Mapping[str, int], may_cross: MayCross = lambda _: True) -> Sharded:
    """Cut a graph into pieces of about equal weight; it is left as it is.

    Before → after::

        f(x, c) = y   →   shard 0 (x) = shard.0, shard.1;   shard 1 (c, shard.0) = shard.2;   …   = y

    1. A piece is a run of nodes in the graph's order. It takes those of the graph's inputs that it reads and what
       pieces before it hand on, and gives what pieces behind it need and those of the graph's outputs that it computes.
    2. Nodes that give constants and sizes, or an input in another type or layout, are in every piece that needs them.
       A Shape of a tensor inside reads an input of the graph that has the same sizes, where there is one.
    3. What crosses is float32 with a known shape. An inner float16 is cast on both sides, which changes no value.
    4. A layer stays with the DequantizeLinear that it reads and the QuantizeLinear of its result; see `find_waists`.
    5. The largest piece weighs as little as can be, or up to 5 % more where less crosses then.
    6. Weights go where they are read, and are copied where that is in several pieces.

    Args:
        model: its values have types and shapes; of any precision, fused or not.
        count: of the pieces; at least 2.
        sizes: of all symbols, at which what crosses is compared.
        may_cross: what else a tensor that crosses must be.

    Raises:
        InputError: the graph cannot be cut into so many pieces.
        PassError: it cannot be cut at all.
    """
    whole = model.clone()
    _read_sizes_of_inputs(whole.graph)
    line = line_up(whole.graph)
    waists = find_waists(line, sizes, may_cross)
    if not waists:
        raise PassError(
            f"{whole.graph.name or 'the graph'} can be cut nowhere: what lives across is not all floating point, of "
            "known sizes that an interface can have",
            hint="run resolve-shapes first, or export without --shards",
        )
    if not 2 <= count <= len(waists) + 1:
        raise InputError(
            f"{count} shards were asked for, and {whole.graph.name or 'the graph'} can be cut into 2 to "
            f"{len(waists) + 1}",
            hint="choose a number in between",
        )
    positions = [0, *(waist.position for waist in waists), len(line.nodes)]
    crossing = [0, *(waist.crossing_bytes for waist in waists), 0]
    cuts = choose_cuts(weight_bytes_between(line, positions), crossing, count)
    names = _names_of_crossing(whole.graph, line, [positions[cut] for cut in cuts[1:-1]])
    models = tuple(_piece(whole, line, positions[first], positions[second], names) for first, second in pairwise(cuts))
    for number, piece in enumerate(models):
        piece.graph.name = f"{CROSSING}_{number}"
    figures = [_figures(piece, handed_on=crossing[cut]) for piece, cut in zip(models, cuts[1:], strict=True)]
    nodes = sum(len(piece.graph) for piece in models)
    report = PassReport("shard", count - 1, (), len(model.graph), nodes, details={"shards": figures})
    return Sharded(models, report)


def _figures(piece: ir.Model, *, handed_on: int) -> dict[str, int]:
    weights = (value.const_value for value in piece.graph.initializers.values())
    return {
        "nodes": len(piece.graph),
        "weight_bytes": sum(weight.nbytes for weight in weights if weight is not None),
        "live_bytes_behind": handed_on,
    }


def _read_sizes_of_inputs(graph: ir.Graph) -> None:
    """Let every Shape of a tensor inside read the same sizes of an input, which every piece can have."""
    for node in graph:
        if not is_operator(node, "Shape") or node.inputs[0] is None or node.inputs[0].producer() is None:
            continue
        read_sizes_of(node, graph.inputs)


def _names_of_crossing(graph: ir.Graph, line: Line, positions: list[int]) -> dict[ir.Value, str]:
    """Names of all values that cross one of the cuts, in the order of the graph; an output of the graph has its own."""
    free: Iterator[str] = free_names(graph, CROSSING)
    crossing = [
        value
        for node in line.nodes
        for value in node.outputs
        if any(line.made_at(value) < position <= max(line.readers.get(value, (0,))) for position in positions)
    ]
    return {value: value.name or "" if value.is_graph_output() else next(free) for value in crossing}


def _piece(whole: ir.Model, line: Line, begin: int, end: int, names: Mapping[ir.Value, str]) -> ir.Model:
    """The nodes from `begin` up to `end`, with what they need of those that are not on the line."""
    copy = whole.clone()
    graph = copy.graph
    twins: dict[ir.Value, ir.Value] = {}
    for node, twin in zip(whole.graph, graph, strict=True):
        twins.update(zip(node.outputs, twin.outputs, strict=True))
    outputs = [twins[value] for value in whole.graph.outputs if _made_between(value, line, begin, end)]
    graph.outputs.clear()
    for value, name in names.items():
        readers = line.readers[value]
        if line.made_at(value) < begin and any(begin <= index < end for index in readers):
            _take_in(graph, twins[value], name)
    for value, name in names.items():
        if begin <= line.made_at(value) < end and max(line.readers[value]) >= end and not value.is_graph_output():
            graph.outputs.append(give_out(graph, twins[value], name))
    graph.outputs.extend(outputs)
    run_passes(TIDYING, copy)
    for value in [each for each in graph.inputs if not each.uses() and not each.is_graph_output()]:
        graph.inputs.remove(value)
    return copy


def _made_between(value: ir.Value, line: Line, begin: int, end: int) -> bool:
    """Whether an output of the graph is one of a piece; what no node of the line computes is the last piece's."""
    producer = value.producer()
    place = None if producer is None else line.place.get(producer)
    return end == len(line.nodes) if place is None else begin <= place < end


def _take_in(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Let all readers of `value` read an input called `name`."""
    assert value.dtype is not None
    outside = describe(ir.Value(), name, value.shape, ir.DataType.FLOAT)
    inside = take_in(graph, outside, value.dtype, before=graph[0])
    ir.convenience.replace_all_uses_with(value, inside)
    value.name = f"{name}.outside"
    graph.inputs.append(outside)
