"""From an ONNX graph to its buffers."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from sdc.engines.errors import PassError
from sdc.passes.matching import site
from sdc.passes.memory.buffers import Buffer, BufferGraph, Step
from sdc.passes.shapes.shape_rules import whole_shape
from sdc.passes.shapes.sizes import product, symbols
from sdc.passes.shapes.stated_types import input_symbols, state_graph_types

_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators whose result is the operand under another shape."""

_SIZE_ONLY = frozenset({"Shape", "Size"})
"""Operators that need no contents of their operand."""

_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})

_ELEMENTWISE = frozenset(
    {"Abs", "Add", "Clip", "Cos", "Div", "Erf", "Exp", "Gelu", "Mul", "Neg", "Relu", "Sigmoid", "Sin", "Sqrt", "Sub"}
    | {"Sum", "Swish", "Tanh"}
)
"""Operators that can write over an operand of the result's size: an element of it needs no other element of that."""


def buffers_from_graph(model: ir.Model) -> BufferGraph:
    """The buffers of a graph, in symbols of its inputs' free sizes; functions are inlined, `model` is not changed.

    1. Each result of a node is a buffer, except views (Reshape, Squeeze, Unsqueeze, Flatten, Identity): they share that
       of their operand. A view of an input or a constant that is an output of the graph is a copy, though.
    2. What depends on constants alone is a constant: an engine computes it once, or as it reads the weight.
    3. A DequantizeLinear that only products read (Conv, Gemm, MatMul) shares the integers' buffer: kernels for integers
       read these.
    4. Shape and Size read nothing.
    5. A node's operands and results all live while it runs. What a kernel needs beside them is not known here.

    Raises:
        PassError: a node holds a subgraph, or the size of a tensor does not follow from the inputs' sizes.
    """
    flat = InlinePass()(model.clone()).model
    state_graph_types(flat.graph)
    collector = _Collector(flat.graph)
    for node in flat.graph:
        collector.add(node)
    return BufferGraph(
        inputs=tuple(collector.buffer(value) for value in flat.graph.inputs),
        buffers=tuple(collector.buffers),
        steps=tuple(collector.steps),
        outputs=tuple(sorted({collector.place[value] for value in flat.graph.outputs if value in collector.place})),
        weight_bytes=sum(value.const_value.nbytes for value in flat.graph.initializers.values() if value.const_value),
    )


class _Collector:
    """The state of one walk over a graph.

    Attributes:
        place: index of the buffer that each value lives in; inputs and constants have none.
        constant: values that depend on constants alone.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.buffers: list[Buffer] = []
        self.steps: list[Step] = []
        self.place: dict[ir.Value, int] = {}
        self._symbols = input_symbols(graph)
        self._constant = set(graph.initializers.values()) - set(graph.inputs)

    def add(self, node: ir.Node) -> None:
        """Note what `node` reads and writes."""
        if any(each.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for each in node.attributes.values()):
            raise PassError(f"{site(node)} holds a subgraph", hint="export the network without control flow")
        operands = [value for value in node.inputs if value is not None]
        results = [value for value in node.outputs if value.name]
        is_output = any(value.is_graph_output() for value in results)
        if all(value in self._constant for value in operands) and not is_output:
            self._constant.update(results)
            return
        if _is_view(node):
            base = operands[0]
            if base in self.place:
                self.place[results[0]] = self.place[base]
                return
            if not is_output:  # of an input or a constant
                self._constant.update({results[0]} if base in self._constant else ())
                return
        reads = () if _reads_sizes_alone(node) else self._places(operands)
        writes = tuple(self._new(value) for value in results)
        over = reads if node.domain == "" and node.op_type in _ELEMENTWISE and len(writes) == 1 else ()
        self.steps.append(Step(node.op_type, reads, writes, over))

    def buffer(self, value: ir.Value) -> Buffer:
        """Name, size and type of a value."""
        shape = whole_shape(value)
        if shape is None or value.dtype is None:
            raise PassError(f"the size of {value.name!r} does not follow from the inputs' sizes: it is {value.shape}")
        elements = product(shape)
        unknown = symbols(elements) - self._symbols
        if unknown:
            raise PassError(f"the size of {value.name!r} depends on {sorted(unknown)}, which belong to no input")
        return Buffer(value.name or "", elements, value.dtype)

    def _new(self, value: ir.Value) -> int:
        self.place[value] = len(self.buffers)
        self.buffers.append(self.buffer(value))
        return self.place[value]

    def _places(self, operands: Sequence[ir.Value]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.place[value] for value in operands if value in self.place))


def _is_view(node: ir.Node) -> bool:
    if node.domain:
        return False
    if node.op_type != "DequantizeLinear":
        return node.op_type in _VIEWS
    readers = list(node.outputs[0].consumers())
    return not node.outputs[0].is_graph_output() and all(
        reader.domain == "" and reader.op_type in _PRODUCTS for reader in readers
    )


def _reads_sizes_alone(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in _SIZE_ONLY
