"""Writes targets of Reshape and its like from sizes that values of the graph have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sdc.passes.matching import constant, producer
from sdc.passes.shapes.shape_rules import known_shape
from sdc.passes.shapes.size_contents import Contents
from sdc.passes.shapes.sizes import Size

_TARGETS = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Resize": 3}
"""Operators with an operand that holds sizes, and its place."""


class SizeVectors:
    """Knows where in the graph each free size can be read, and rewrites operands that hold sizes.

    Used in the graph's order: `add` a node once the nodes before it are done.
    """

    def __init__(self, graph: ir.Graph, contents: Mapping[ir.Value, Contents]) -> None:
        self._graph = graph
        self._contents = contents
        self._places: dict[Size, list[tuple[ir.Value, int]]] = {}
        self._made: dict[tuple[Size, ...], ir.Value] = {}
        for value in graph.inputs:
            self._add_value(value)

    def add(self, node: ir.Node) -> None:
        """From here on the sizes of the node's outputs can be read."""
        if node.graph is self._graph:
            for value in node.outputs:
                self._add_value(value)

    def _add_value(self, value: ir.Value) -> None:
        for axis, size in enumerate(known_shape(value) or ()):
            if isinstance(size, ir.SymbolicDim) and len(self._places.setdefault(size, [])) < 8:
                self._places[size].append((value, axis))

    def rewrite_target(self, node: ir.Node) -> bool:
        """Give `node` the shortest target that means the same; whether it changed."""
        place = _TARGETS.get(node.op_type) if node.domain == "" else None
        if place is None or len(node.inputs) <= place or node.inputs[place] is None:
            return False
        target = node.inputs[place]
        assert target is not None
        shape = known_shape(node.outputs[0])
        if shape is None or None in shape:
            return False
        if node.op_type == "Reshape":
            operand = known_shape(node.inputs[0])
            wanted = self._reshape_target(operand or (), shape)  # type: ignore[arg-type]
        elif constant(target) is not None:
            return False
        else:
            held = self._contents.get(target)
            wanted = None if held is None else tuple(held.flat)
        if wanted is None or self._is_shortest(target, wanted):
            return False
        vector = self._vector(wanted, node)
        if vector is None:
            return False
        node.replace_input_with(place, vector)
        if node.op_type == "Reshape":
            node.attributes.pop("allowzero", None)
        return True

    def _is_shortest(self, target: ir.Value, wanted: tuple[Size, ...]) -> bool:
        """Whether `target` holds `wanted` already and is made as `_vector` makes it."""
        held = self._contents.get(target)
        if held is None or tuple(held.flat) != wanted:
            return False
        concat = producer(target, "Concat")
        pieces = [target] if concat is None else concat.inputs
        return all(producer(piece, "Shape") or constant(piece) is not None for piece in pieces)

    def _reshape_target(self, old: Sequence[Size | None], new: Sequence[Size]) -> tuple[Size, ...] | None:
        """Numbers, 0 for what is copied, and -1 for one size that is neither and cannot be read."""
        target: list[Size] = [
            size if isinstance(size, int) else 0 if axis < len(old) and old[axis] == size else size
            for axis, size in enumerate(new)
        ]
        if 0 in new:
            return None  # an empty tensor: 0 would be read as a copy
        free = [axis for axis, size in enumerate(target) if not isinstance(size, int)]
        unreadable = [axis for axis in free if target[axis] not in self._places]
        if len(unreadable) > 1:
            return None
        if len(free) == 1 or unreadable:
            target[unreadable[0] if unreadable else free[0]] = -1
        return tuple(target)

    def _vector(self, sizes: tuple[Size, ...], node: ir.Node) -> ir.Value | None:
        """A value that holds `sizes`, computed before `node`; None if one of them cannot be read."""
        if sizes in self._made:
            return self._made[sizes]
        pieces = self._pieces(sizes)
        if pieces is None:
            return None
        parts = [self._piece(piece, node) for piece in pieces]
        vector = parts[0]
        if len(parts) > 1:
            concat = ir.node("Concat", parts, {"axis": 0})
            self._insert(concat, node, len(sizes))
            vector = concat.outputs[0]
        self._made[sizes] = vector
        return vector

    def _pieces(self, sizes: tuple[Size, ...]) -> list[tuple[int, ...] | tuple[ir.Value, int, int]] | None:
        """`sizes` as runs: numbers, or neighbouring axes of one value."""
        pieces: list[tuple[int, ...] | tuple[ir.Value, int, int]] = []
        index = 0
        while index < len(sizes):
            size = sizes[index]
            end = index + 1
            if isinstance(size, int):
                while end < len(sizes) and isinstance(sizes[end], int):
                    end += 1
                pieces.append(tuple(sizes[index:end]))  # type: ignore[arg-type]
            else:
                runs = [
                    (self._run(value, axis, sizes[index:]), value, axis) for value, axis in self._places.get(size, ())
                ]
                if not runs:
                    return None
                length, value, axis = max(runs, key=lambda run: run[0])
                pieces.append((value, axis, axis + length))
                end = index + length
            index = end
        return pieces

    def _run(self, value: ir.Value, axis: int, sizes: Sequence[Size]) -> int:
        """How many of `sizes` stand next to each other in the shape of `value`, from `axis` on."""
        shape = known_shape(value)
        assert shape is not None
        length = 0
        for ours, wanted in zip(shape[axis:], sizes, strict=False):
            if isinstance(wanted, int) or ours != wanted:
                break
            length += 1
        return length

    def _piece(self, piece: tuple[int, ...] | tuple[ir.Value, int, int], node: ir.Node) -> ir.Value:
        if isinstance(piece[0], ir.Value):
            value, start, end = piece
            shape = ir.node("Shape", [value], {"start": start, "end": end})
            self._insert(shape, node, end - start)
            return shape.outputs[0]
        return self._constant(piece)

    def _constant(self, numbers: tuple[int, ...]) -> ir.Value:
        if numbers not in self._made:
            name = "sizes_" + "_".join(str(number).replace("-", "m") for number in numbers)
            while name in self._graph.initializers:
                name += "_"
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(numbers)]))
            value.const_value = ir.tensor(np.array(numbers, np.int64), name=name)
            self._graph.register_initializer(value)
            self._made[numbers] = value
        return self._made[numbers]

    def _insert(self, new: ir.Node, before: ir.Node, length: int) -> None:
        new.outputs[0].dtype = ir.DataType.INT64
        new.outputs[0].shape = ir.Shape([length])
        self._graph.insert_before(before, new)
