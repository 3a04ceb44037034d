"""Cutting a graph in pieces that meet in float32 tensors; see `hoist`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from sdc.passes.base import run_passes
from sdc.passes.domain import ADD_GROUP_NORM_SILU, is_fused
from sdc.passes.hoisting.crossing import Packet, describe, give_out, packets_of, take_in
from sdc.passes.hoisting.hoist_cut import Cut
from sdc.passes.hoisting.row_wise import BROADCASTING
from sdc.passes.simplify.fix_names import FixNames
from sdc.passes.simplify.remove_unused import RemoveUnused

TIDYING = (RemoveUnused(), FixNames())
"""What a graph needs once it was cut."""


def split_graph(model: ir.Model, cut: Cut) -> dict[str, ir.Model]:
    """Take the lifted nodes out of `model`, in place, and give back the graphs that compute what crosses, by part.

    Weights are not copied: each goes where its readers go.
    """
    packets = packets_of(model.graph, cut)
    parts = {part: _extract(model, cut, part, its) for part, its in packets.items() if its}
    inputs = list(model.graph.inputs)
    rest = _Rest(model.graph, cut)
    for packet in (each for its in packets.values() for each in its):
        rest.read_from_outside(packet)
    run_passes(TIDYING, model)
    for value in inputs:
        if not value.uses() and not value.is_graph_output() and _left(value, parts.values()):
            model.graph.inputs.remove(value)
    return parts


def _left(value: ir.Value, parts: Iterable[ir.Model]) -> bool:
    return any(value.name == each.name for part in parts for each in part.graph.inputs)


def _extract(model: ir.Model, cut: Cut, part: str, packets: Iterable[Packet]) -> ir.Model:
    """The graph of one part."""
    copy = model.clone()
    twins: dict[ir.Value, ir.Value] = {}
    for node, twin in zip(model.graph, copy.graph, strict=True):
        twins.update(zip(node.outputs, twin.outputs, strict=True))
        for value in node.outputs:
            if value in cut.batches and cut.lifted.get(node) == part:
                twins[value] = _keep_one_row(twins[value])
    copy.graph.outputs.clear()
    for packet in packets:
        joined = packet.join(copy.graph, [twins[value] for value in packet.values])
        copy.graph.outputs.append(give_out(copy.graph, joined, packet.name))
    copy.graph.name = part
    run_passes(TIDYING, copy)
    for value in [each for each in copy.graph.inputs if not each.uses()]:
        copy.graph.inputs.remove(value)
    return copy


def _keep_one_row(twin: ir.Value) -> ir.Value:
    """A value with one row; for the Expand that would repeat it, what it is given."""
    node = twin.producer()
    assert node is not None
    if node.op_type == "Expand":
        source = node.inputs[0]
        assert source is not None
        ir.convenience.replace_all_uses_with(twin, source)
        return source
    assert twin.shape is not None
    twin.shape = ir.Shape([1, *twin.shape[1:]])
    return twin


class _Rest:
    """What stays of a graph, while the values that cross become its inputs."""

    def __init__(self, graph: ir.Graph, cut: Cut) -> None:
        self.graph = graph
        self.cut = cut
        self.one_row: set[ir.Value] = set(cut.batches)
        self.first = graph[0]

    def read_from_outside(self, packet: Packet) -> None:
        """Make what is in a packet an input to all that stays."""
        outside = describe(ir.Value(), packet.name, packet.shape, ir.DataType.FLOAT)
        self.graph.inputs.append(outside)
        whole = take_in(self.graph, outside, packet.dtype, before=self.first)
        for value, inside in zip(packet.values, packet.split(self.graph, whole, before=self.first), strict=True):
            self._read(value, inside)

    def _read(self, value: ir.Value, inside: ir.Value) -> None:
        """Let all that stays read `inside`, which may have one row, in place of `value`."""
        repeated = inside
        if (batch := self.cut.batches.get(value)) is not None:
            self.one_row.add(inside)
            if value.is_graph_output() or any(not self._broadcasts(node, index) for node, index in self._uses(value)):
                repeated = self._repeat(inside, batch, value)
        for node, index in self._uses(value):
            node.replace_input_with(index, inside if self._broadcasts(node, index) else repeated)
        if value.is_graph_output():
            self._pass_through(value, repeated)

    def _uses(self, value: ir.Value) -> list[tuple[ir.Node, int]]:
        return [(node, index) for node, index in value.uses() if node not in self.cut.lifted]

    def _broadcasts(self, node: ir.Node, index: int) -> bool:
        """Whether a node repeats the one row of an operand by itself, for the rows of another operand."""
        operands = [each for each in node.inputs if each is not None]
        if is_fused(node, ADD_GROUP_NORM_SILU):
            return index == 1 and operands[0] not in self.one_row
        if node.domain or node.op_type not in BROADCASTING:
            return False
        rank = len(node.inputs[index].shape or ())  # type: ignore[union-attr]
        return any(
            each not in self.one_row and each.shape is not None and len(each.shape) == rank and each.shape[0] != 1
            for each in operands
        )

    def _repeat(self, inside: ir.Value, batch: ir.Value, value: ir.Value) -> ir.Value:
        """`inside` with the rows that `value` had."""
        rank = len(value.shape or ())
        size, nodes = batch, []
        if rank > 1:
            ones = ir.Value(
                name=f"{value.name}.ones", shape=ir.Shape([rank - 1]), type=ir.TensorType(ir.DataType.INT64)
            )
            ones.const_value = ir.tensor(np.ones(rank - 1, np.int64), name=ones.name)
            self.graph.register_initializer(ones)
            nodes.append(ir.node("Concat", [batch, ones], {"axis": 0}))
            size = describe(nodes[0].outputs[0], f"{value.name}.size", ir.Shape([rank]), ir.DataType.INT64)
        nodes.append(ir.node("Expand", [inside, size]))
        producer = batch.producer()
        if producer is None:
            self.graph.insert_before(self.first, nodes)
        else:
            self.graph.insert_after(producer, nodes)
        return describe(nodes[-1].outputs[0], f"{value.name}.repeated", value.shape, value.dtype)

    def _pass_through(self, value: ir.Value, inside: ir.Value) -> None:
        """Let `inside` take the place of `value` among the graph's outputs, under its name."""
        node = ir.node("Identity", [inside])
        self.graph.append(node)
        passed = describe(node.outputs[0], value.name, value.shape, value.dtype)
        value.name = f"{value.name}.outside"
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = passed
