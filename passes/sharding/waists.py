"""Where a graph can be cut in its order, what crosses there, and what each piece weighs; see `shard`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from sdc.passes.dependence import inputs_behind_values
from sdc.passes.matching import is_operator
from sdc.passes.precision.layer_roles import LAYOUT

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
"""Operators that have kernels for integers."""

_BYTES_PER_ELEMENT = 4
"""What crosses is float32."""

MayCross = Callable[[ir.Shape], bool]
"""Whether a tensor of that shape can be an input or output of an engine."""


@dataclass(frozen=True)
class Line:
    """A graph as a line of nodes.

    Attributes:
        nodes: that compute something of the inputs, in the order of the graph. The others give constants and sizes, or
            an input in another type or layout: they are cheap, and every piece has those that it needs.
        place: the index of each node in `nodes`.
        readers: by value that is computed along the line, the indices of the nodes that need it, through nodes that are
            not on the line too.
        weights: by initialiser, likewise.
    """

    nodes: tuple[ir.Node, ...]
    place: Mapping[ir.Node, int]
    readers: Mapping[ir.Value, tuple[int, ...]]
    weights: Mapping[ir.Value, tuple[int, ...]]

    def made_at(self, value: ir.Value) -> int:
        """Index of the node that computes a value of the line."""
        producer = value.producer()
        assert producer is not None
        return self.place[producer]


@dataclass(frozen=True)
class Waist:
    """A place between two nodes where a graph can be cut.

    Attributes:
        position: index of the node behind it, in `Line.nodes`.
        crossing_bytes: of all tensors that live across it, in float32.
    """

    position: int
    crossing_bytes: int


def line_up(graph: ir.Graph) -> Line:
    """The line of a graph's nodes."""
    behind = inputs_behind_values(graph)
    apart: set[ir.Node] = set()
    for node in graph:
        of_inputs = all(value is None or value.producer() is None or value.producer() in apart for value in node.inputs)
        if not any(behind[value] for value in node.outputs) or (of_inputs and _only_moves(node)):
            apart.add(node)
    nodes = tuple(node for node in graph if node not in apart)
    place = {node: index for index, node in enumerate(nodes)}
    readers: dict[ir.Value, list[int]] = {}
    weights: dict[ir.Value, list[int]] = {}
    for index, node in enumerate(nodes):
        for value in _values_behind(node, place):
            if value.producer() is not None:
                readers.setdefault(value, []).append(index)
            elif value.is_initializer():
                weights.setdefault(value, []).append(index)
    return Line(
        nodes,
        place,
        {value: tuple(its) for value, its in readers.items()},
        {value: tuple(its) for value, its in weights.items()},
    )


def _only_moves(node: ir.Node) -> bool:
    return not node.domain and (node.op_type in LAYOUT or node.op_type == "Split")


def _values_behind(node: ir.Node, place: Mapping[ir.Node, int]) -> list[ir.Value]:
    """What a node reads: initialisers, inputs and values of the line; of other nodes, what these read."""
    found: dict[ir.Value, None] = {}
    pending = [value for value in node.inputs if value is not None]
    while pending:
        value = pending.pop()
        producer = value.producer()
        if producer is None or producer in place:
            found[value] = None
        else:
            pending += [each for each in producer.inputs if each is not None]
    return list(found)


def find_waists(line: Line, sizes: Mapping[str, int], may_cross: MayCross) -> list[Waist]:
    """All places where a graph can be cut, in order.

    1. All that lives across is floating point, of a known size that `may_cross` allows.
    2. No layer is parted from the DequantizeLinear that it reads, nor from the QuantizeLinear of its result: with them
       it is a kernel for integers. Nor is a QuantizeLinear from a DequantizeLinear before it, which backends make one.

    Args:
        line: from `line_up`.
        sizes: of all symbols, to count bytes with.
        may_cross: see `MayCross`.
    """
    parted = [0] * (len(line.nodes) + 1)
    live = [0] * (len(line.nodes) + 1)
    for value, readers in line.readers.items():
        begin, end = line.made_at(value) + 1, max(readers)  # positions between the two
        size = _bytes_of(value, sizes) if value.dtype in _FLOATS and _is_known(value) else None
        if size is None or not may_cross(value.shape or ir.Shape([])):
            _add(parted, begin, end, 1)
        else:
            _add(live, begin, end, size)
        together = [index for index in readers if _are_one_kernel(value.producer(), line.nodes[index])]
        _add(parted, begin, max(together, default=0), 1)
    return [Waist(position, live[position]) for position in range(1, len(line.nodes)) if not parted[position]]


def _add(counts: list[int], begin: int, end: int, amount: int) -> None:
    for position in range(begin, end + 1):
        counts[position] += amount


def _are_one_kernel(maker: ir.Node | None, reader: ir.Node) -> bool:
    """Whether a backend makes integer arithmetic of two nodes together."""
    if is_operator(maker, "DequantizeLinear"):
        return _is_layer(reader) or is_operator(reader, "QuantizeLinear")
    return maker is not None and _is_layer(maker) and is_operator(reader, "QuantizeLinear")


def _is_layer(node: ir.Node) -> bool:
    return not node.domain and node.op_type in _LAYERS


def _is_known(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(size, int) or size.value is not None for size in value.shape)


def _bytes_of(value: ir.Value, sizes: Mapping[str, int]) -> int | None:
    """Bytes of a value in float32; None if a size depends on a symbol that has none."""
    total = _BYTES_PER_ELEMENT
    for size in value.shape or ():
        found = size if isinstance(size, int) else size.evaluate(sizes)
        if not isinstance(found, int):
            return None
        total *= found
    return total


def weight_bytes_between(line: Line, cuts: Sequence[int]) -> list[list[int]]:
    """Bytes of the weights that the nodes between any two cuts read, each weight counted once.

    Args:
        line: from `line_up`.
        cuts: positions in order, the two ends of the line among them.

    Returns:
        By number of the first and the second cut; 0 where the second is not behind the first.
    """
    pieces = _weights_of_pieces(line, cuts)
    table = [[0] * len(cuts) for _ in cuts]
    for first in range(len(cuts)):
        seen: set[ir.Value] = set()
        total = 0
        for second in range(first + 1, len(cuts)):
            new = pieces[second - 1] - seen
            total += sum(_stored_bytes(value) for value in new)
            seen |= new
            table[first][second] = total
    return table


def _weights_of_pieces(line: Line, cuts: Sequence[int]) -> list[set[ir.Value]]:
    pieces: list[set[ir.Value]] = [set() for _ in cuts[1:]]
    piece_of = [number for number, (begin, end) in enumerate(pairwise(cuts)) for _ in range(begin, end)]
    for value, readers in line.weights.items():
        for index in readers:
            pieces[piece_of[index]].add(value)
    return pieces


def _stored_bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes
