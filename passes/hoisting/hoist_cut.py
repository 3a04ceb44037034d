"""Where a UNet is cut so that what does not change between steps can leave it; see `hoist`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes.base import Skipped
from sdc.passes.dependence import inputs_behind_values
from sdc.passes.hoisting.row_wise import gives_one_row, is_constant, mixes_rows
from sdc.passes.matching import is_operator, site
from sdc.passes.precision.layer_roles import LAYOUT, SEQUENCE_RANK

PROMPT, TIMESTEP = "prompt", "timestep"

_MOVING = LAYOUT | {"Expand", "Tile", "Slice", "Split"}
"""Operators that only move values about, and may repeat them."""

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

_ASSUMED_SIZE = 2
"""What a free size counts in comparing tensors: the rows of one picture with guidance."""


@dataclass(frozen=True)
class Cut:
    """Which nodes leave a graph, and over which values.

    Attributes:
        lifted: the part that each leaving node goes to.
        crossing: by part, the values that the rest of the graph reads, in the order of the graph.
        batches: by value that is computed for one row where it had equal rows, the size that the rows were repeated to.
        skipped: nodes that depend on one part's inputs and cannot leave.
    """

    lifted: dict[ir.Node, str]
    crossing: dict[str, tuple[ir.Value, ...]]
    batches: dict[ir.Value, ir.Value]
    skipped: tuple[Skipped, ...]


def choose_cut(graph: ir.Graph) -> Cut:
    """Find the nodes that leave.

    Raises:
        PassError: an input of the graph has no known rank, or a value that would cross has no known shape.
    """
    finder = _Finder(graph)
    finder.lift()
    while finder.move_back():
        pass
    finder.drop_idle()
    crossing = {part: tuple(finder.crossing(part)) for part in (PROMPT, TIMESTEP)}
    for value in (each for values in crossing.values() for each in values):
        if value.shape is None or any(not isinstance(size, int) and size.value is None for size in value.shape):
            raise PassError(f"the shape of {value.name!r} is unknown", hint="run infer-shapes first")
    return Cut(finder.lifted, crossing, finder.batches, tuple(finder.skipped))


class _Finder:
    """The search's state: what is lifted so far, which values are of one row, and what was refused."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.behind = inputs_behind_values(graph)
        self.parts = {value: _part_of_input(value) for value in graph.inputs}
        self.lifted: dict[ir.Node, str] = {}
        self.batches: dict[ir.Value, ir.Value] = {}
        self.skipped: list[Skipped] = []
        self._available: dict[str, set[ir.Value]] = {
            part: {value for value, its in self.parts.items() if its == part} for part in (PROMPT, TIMESTEP)
        }

    def lift(self) -> None:
        """Take every node whose numbers depend on one part's inputs and that can be computed from them."""
        for node in self.graph:
            its = {self.parts[value] for output in node.outputs for value in self.behind[output]}
            if not its:
                for part, available in self._available.items():
                    # Shapes of values with fewer rows than they had would be wrong.
                    if not any(value in self.batches for value in node.inputs) and self._computable(node, part):
                        available.update(node.outputs)
            elif len(its) == 1 and (only := its.pop()) is not None:
                self._lift_node(node, only)

    def _lift_node(self, node: ir.Node, part: str) -> None:
        available = self._available[part]
        if self._repeats_for_batch(node, part):
            self.batches[node.outputs[0]] = node.inputs[1]  # type: ignore[assignment]
        elif not self._computable(node, part):
            if any(
                value is not None and not self.behind.get(value, True) and value not in available
                for value in node.inputs
            ):
                self.skipped.append(Skipped(site(node), "a size that it needs is that of another input"))
            return
        elif batch := next((self.batches[value] for value in node.inputs if value in self.batches), None):
            reason = mixes_rows(node, self.batches.keys())
            if reason is not None:
                self.skipped.append(Skipped(site(node), reason))
                return
            if gives_one_row(node, self.batches.keys()):
                self.batches.update(dict.fromkeys(node.outputs, batch))
        self.lifted[node] = part
        available.update(node.outputs)

    def _computable(self, node: ir.Node, part: str) -> bool:
        available = self._available[part]
        return all(value is None or value in available or is_constant(value) for value in node.inputs)

    def _repeats_for_batch(self, node: ir.Node, part: str) -> bool:
        """Whether it is the Expand of [1] to a size that is only known where the sample is."""
        if not is_operator(node, "Expand"):
            return False
        value, size = node.inputs
        return (
            value in self._available[part]
            and value.shape is not None
            and value.shape.dims == (1,)
            and node.outputs[0].shape is not None
            and len(node.outputs[0].shape) == 1
            and size is not None
            and not is_constant(size)
            and not self.behind[size]
        )

    def crossing(self, part: str) -> Iterator[ir.Value]:
        """Results of the part's nodes that the rest of the graph reads or gives out."""
        needed = self._needed()
        for node, its in self.lifted.items():
            for output in node.outputs if its == part else ():
                if output.is_graph_output() or any(reader in needed for reader in output.consumers()):
                    yield output

    def _needed(self) -> set[ir.Node]:
        """Nodes of the rest that its outputs depend on."""
        needed: set[ir.Node] = set()
        pending = [value.producer() for value in self.graph.outputs]
        while pending:
            node = pending.pop()
            if node is None or node in needed or node in self.lifted:
                continue
            needed.add(node)
            pending.extend(value.producer() for value in node.inputs if value is not None)
        return needed

    def move_back(self) -> bool:
        """Leave nodes where they are if fewer or smaller values cross without them; whether there were any."""
        needed = self._needed()
        last = [node for node in self.lifted if self._is_last(node, needed)]
        staying: list[ir.Node] = []
        for part in (PROMPT, TIMESTEP):
            for value in self.crossing(part):
                if value.dtype not in _FLOATS:
                    staying += self._dependents(value)
        by_source: dict[ir.Value, list[ir.Node]] = {}
        for node in last:
            if not node.domain and node.op_type in _MOVING and node.inputs[0] is not None:
                by_source.setdefault(node.inputs[0], []).append(node)
        for source, nodes in by_source.items():
            crosses = any(reader in needed for reader in source.consumers())
            saved = self._elements(output for node in nodes for output in node.outputs)
            saved -= 0 if crosses else self._elements([source])
            if saved > 0 or (saved == 0 and all(map(_is_cast_from_float32, nodes))):
                staying += nodes
        for node in staying:
            self.lifted.pop(node, None)
        return bool(staying)

    def _is_last(self, node: ir.Node, needed: set[ir.Node]) -> bool:
        """Whether all that reads the node stays."""
        readers = {reader for output in node.outputs for reader in output.consumers()}
        return readers <= needed and not any(output.is_graph_output() for output in node.outputs)

    def _dependents(self, value: ir.Value) -> list[ir.Node]:
        """The lifted nodes that give `value` or depend on it."""
        behind = {value.producer()}
        for node in self.lifted:
            if any(each is not None and each.producer() in behind for each in node.inputs):
                behind.add(node)
        return [node for node in self.lifted if node in behind]

    def _elements(self, values: Iterable[ir.Value]) -> int:
        total = 0
        for value in values:
            sizes = [size if isinstance(size, int) else _ASSUMED_SIZE for size in value.shape or ()]
            if value in self.batches:
                sizes[0] = 1
            total += math.prod(sizes)
        return total

    def drop_idle(self) -> None:
        """Keep only nodes that do arithmetic and what these read."""
        working: set[ir.Node] = set()
        for node in self.lifted:
            behind = (value.producer() for value in node.inputs if value is not None)
            if node.domain or node.op_type not in _MOVING or any(each in working for each in behind):
                working.add(node)
        for node in reversed(list(self.lifted)):
            readers = {reader for output in node.outputs for reader in output.consumers()}
            if node not in working and not readers & working:
                del self.lifted[node]
            else:
                working.add(node)


def _part_of_input(value: ir.Value) -> str | None:
    if value.shape is None:
        raise PassError(f"input {value.name!r} has no known rank", hint="export it with a shape")
    rank = len(value.shape)
    return PROMPT if rank == SEQUENCE_RANK else TIMESTEP if rank < SEQUENCE_RANK else None


def _is_cast_from_float32(node: ir.Node) -> bool:
    return is_operator(node, "Cast") and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT
