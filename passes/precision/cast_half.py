"""A graph in a 16-bit floating-point type, with float32 where that would break."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes import domain
from sdc.passes.base import Pass, PassReport
from sdc.passes.matching import constant, is_operator, site
from sdc.passes.precision.half_tensors import EXACT_CONSTANT, half_from_tensor
from sdc.passes.precision.operator_types import accepts, output_dtype

_HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Attention"})
"""A float32 island ends here: what feeds a sinusoid through one of these is an activation like any other."""

DTYPE_ATTRIBUTES = {"Cast": "to", "EyeLike": "dtype", "RandomNormal": "dtype", "DequantizeLinear": "output_dtype"}
"""Attributes that name the element type of the output."""


@dataclass(frozen=True)
class CastHalf(Pass):
    """Float32 tensors inside the graph become 16-bit ones; inputs and outputs of the graph keep their type.

    Before → after, with T = float16 or bfloat16::

        y = f(x, w)  →  y = Cast(f(Cast(x, T), w_T), float32)

    Casts stand only where T meets float32: at the graph's border and around the islands that stay in float32.
    Weights are converted when they are written, so that no second copy of them is held.

    What stays in float32:

    1. `islands` (sinusoids of the timestep: float16 has a step of 0.5 at 999) and the cheap operators that feed them.
    2. Nodes whose first output is named in `float32`, with the Q/DQ pairs that feed them; if `only` is given, all whose
       first output is not named there.
    3. Operands for which the operator's schema knows no T (the scales of Resize).
    4. What the graph itself casts from T to float32.
    5. Statistics of normalisations, by their ``stash_type`` of 1, which is left as it is; the softmax inside
       Attention, by ``softmax_precision`` where it is set.

    6. With `products`, all but products, a constant that is added to one, attention, and rows of tables: sums over a
       whole network, which lose most where each is rounded, and their normalisations.

    Finite constants beyond the type's range (masks) are clamped to it; small constants that become zero are counted.

    Preconditions:

    1. No model-local function outside of domain `sdc` (inline first): the bodies of `sdc` have no element type.
    2. No subgraphs.

    Attributes:
        islands: operators that compute in float32 together with what feeds them.
        float32: names of first outputs of nodes that compute in float32.
        only: names of first outputs of the nodes that compute in T; None for all.
        products: whether little else than products is computed in T.
    """

    dtype: ClassVar[ir.DataType]

    islands: frozenset[str] = frozenset({"Sin", "Cos"})
    float32: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    products: bool = False

    def rewrite(self, model: ir.Model) -> PassReport:
        """Convert the whole graph; the match count is the number of values that have 16 bits now.

        Raises:
            PassError: a precondition does not hold, or a node that is named does not exist.
        """
        check_convertible(model, self.name)
        island = _island_nodes(model.graph, self.islands) | self._named_nodes(model.graph)
        if self.products:
            island |= {node for node in model.graph if not _is_product(node)}
        conversion = _Conversion(model.graph, island, self.dtype)
        for node in list(model.graph):
            conversion.convert_node(node)
        conversion.restore_outputs()
        return PassReport(
            name=self.name,
            matched=conversion.counts["values"],
            details={
                "casts": conversion.counts["casts"],
                "float32_nodes": len(conversion.island),
                "weights": conversion.counts["weights"],
                "clamped": conversion.counts["clamped"],
                "underflowed": conversion.counts["underflowed"],
            },
        )

    def _named_nodes(self, graph: ir.Graph) -> set[ir.Node]:
        by_name = {node.outputs[0].name or "": node for node in graph}
        missing = sorted((self.float32 | (self.only or frozenset())) - set(by_name))
        if missing:
            raise PassError(f"{self.name}: the graph has no node with the outputs {missing[:3]}")
        others = set() if self.only is None else set(by_name) - self.only
        named = {by_name[name] for name in self.float32 | others}
        dequantised = {value.producer() for node in named for value in node.inputs[:1] if value is not None}
        readers = {node for node in dequantised if node is not None and node.op_type == "DequantizeLinear"}
        feeding = {value.producer() for node in readers for value in node.inputs[:1] if value is not None}
        return named | readers | {node for node in feeding if node is not None}


def _is_product(node: ir.Node) -> bool:
    """Whether it is a product, adds a constant to one, is attention, or picks rows of a table of floats."""
    first = node.inputs[0] if node.inputs else None
    if is_operator(node, "Add"):
        feeders = [value.producer() for value in node.inputs if value is not None]
        has_bias = any(constant(value) is not None for value in node.inputs)
        return has_bias and any(each is not None and each.op_type in _HEAVY for each in feeders)
    if is_operator(node, "Gather"):
        return first is not None and first.is_initializer() and first.dtype == ir.DataType.FLOAT
    return node.op_type in _HEAVY or node.op_type == domain.MULTI_HEAD_ATTENTION


def check_convertible(model: ir.Model, name: str) -> None:
    """Check that a pass of this name can tell the type of every value of a graph.

    Raises:
        PassError: it holds subgraphs, or functions that are not ours.
    """
    foreign = [str(key) for key, function in model.functions.items() if function.domain != domain.DOMAIN]
    if foreign:
        raise PassError(f"{name}: functions {foreign} have bodies of unknown types", hint="run inline-functions first")
    for node in model.graph:
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            raise PassError(f"{name}: {site(node)} holds a subgraph", hint="export the network without control flow")


def _island_nodes(graph: ir.Graph, islands: frozenset[str]) -> set[ir.Node]:
    """Nodes that stay in float32: the islands and, backwards, the cheap floating-point operators that feed them."""
    found: set[ir.Node] = set()
    pending = [node for node in graph if node.domain == "" and node.op_type in islands]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        for value in node.inputs:
            feeder = None if value is None or value.dtype != ir.DataType.FLOAT else value.producer()
            if feeder is not None and feeder.domain == "" and feeder.op_type not in _HEAVY:
                pending.append(feeder)
    return found


@dataclass
class _Conversion:
    """The state of one run over one graph.

    Attributes:
        island: nodes that stay in float32.
        half: the 16-bit type.
        counts: figures for the report.
        twins: (value, element type) → the same value in that type.
    """

    graph: ir.Graph
    island: set[ir.Node]
    half: ir.DataType
    counts: Counter[str] = field(default_factory=Counter)
    twins: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)

    def convert_node(self, node: ir.Node) -> None:
        """Give `node` operands of the type that it computes in, and its outputs their new type."""
        version = self.graph.opset_imports.get(node.domain, 1)
        in_half = node not in self.island
        for index, value in enumerate(node.inputs):
            # Cast takes every type as it comes.
            if value is None or node.op_type == "Cast" or value.dtype not in (ir.DataType.FLOAT, self.half):
                continue
            wanted = self.half if in_half and accepts(node, index, version, self.half) else ir.DataType.FLOAT
            if value.dtype != wanted:
                node.replace_input_with(index, self._in_type(value, wanted, before=node))
        if in_half:
            self._retype_attributes(node)
        for index, output in enumerate(node.outputs):
            dtype = output_dtype(node, index, version)
            self.counts["values"] += dtype == self.half != output.dtype
            if dtype is not None:
                output.type = ir.TensorType(dtype)  # a clone shares its type object with the original

    def restore_outputs(self) -> None:
        """Give the graph's outputs back their type and their names."""
        for index, value in enumerate(self.graph.outputs):
            node = value.producer()
            if node is None or value.dtype != self.half:
                continue
            name = value.name
            value.name = f"{name}.{self.half.name.lower()}"
            cast = cast_of(value, ir.DataType.FLOAT)
            cast.outputs[0].name = name
            self.graph.insert_after(node, cast)
            self.graph.outputs[index] = cast.outputs[0]
            self.counts["casts"] += 1

    def _in_type(self, value: ir.Value, wanted: ir.DataType, *, before: ir.Node) -> ir.Value:
        key = (value, wanted)
        if key not in self.twins:
            if value.is_initializer():
                self.twins[key] = self._half_initializer(value)
            else:
                cast = cast_of(value, wanted)
                self.graph.insert_before(before, cast)
                self.twins[key] = cast.outputs[0]
                self.counts["casts"] += 1
        return self.twins[key]

    def _half_initializer(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        half = half_from_tensor(value.const_value, self.half)
        self.counts["weights"] += 1
        self.counts["clamped"] += half.clamped
        self.counts["underflowed"] += half.underflowed
        twin = ir.Value(
            name=f"{value.name}.{self.half.name.lower()}",
            shape=value.shape,
            type=ir.TensorType(self.half),
            const_value=half.tensor,
        )
        twin.meta[EXACT_CONSTANT] = value.const_value
        self.graph.register_initializer(twin)
        return twin

    def _retype_attributes(self, node: ir.Node) -> None:
        name = DTYPE_ATTRIBUTES.get(node.op_type, "") if node.domain == "" else ""
        if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype == self.half:
            return  # asked for float32 where 16 bits are at hand: an island of the graph's author
        if name in node.attributes and node.attributes.get_int(name) == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrInt64(name, self.half)
        if node.op_type == "ConstantOfShape" and node.outputs[0].dtype == ir.DataType.FLOAT:
            fill = node.attributes["value"].as_tensor() if "value" in node.attributes else ir.tensor([0.0])
            node.attributes["value"] = ir.AttrTensor("value", half_from_tensor(fill, self.half).tensor)


def cast_of(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    """A Cast of a value, which is not in the graph yet; its result is named after both."""
    node = ir.node("Cast", [value], {"to": dtype.value})
    output = node.outputs[0]
    output.name, output.shape, output.dtype = f"{value.name}.{dtype.name.lower()}", value.shape, dtype
    return node
