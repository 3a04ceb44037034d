"""Compute in float16, with float32 where float16 would break."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes import domain
from sdc.passes.base import Pass, PassReport
from sdc.passes.matching import site
from sdc.passes.precision.half_tensors import half_from_tensor
from sdc.passes.precision.operator_types import accepts_half, output_dtype

_HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Attention"})
"""A float32 island ends here: what feeds a sinusoid through one of these is an activation like any other."""

_DTYPE_ATTRIBUTES = {"Cast": "to", "EyeLike": "dtype", "RandomNormal": "dtype", "DequantizeLinear": "output_dtype"}
"""Attributes that name the element type of the output."""


@dataclass(frozen=True)
class CastFp16(Pass):
    """Float32 tensors inside the graph become float16; inputs and outputs of the graph keep their type.

    Before → after::

        y = f(x, w)  →  y = Cast(f(Cast(x, float16), w_16), float32)

    Casts stand only where float16 meets float32: at the graph's border and around the islands that stay in float32.
    Weights are converted when they are written, so that no second copy of them is held.

    What stays in float32:

    1. `islands` (sinusoids of the timestep: float16 has a step of 0.5 at 999) and the cheap operators that feed them.
    2. Operands for which the operator's schema knows no float16 (the scales of Resize).
    3. What the graph itself casts from float16 to float32.
    4. Statistics of normalisations, by their ``stash_type`` of 1, which is left as it is; the softmax inside
       Attention, by ``softmax_precision`` where it is set.

    Finite constants beyond ±65504 (masks) are clamped to it; small constants that become zero are counted.

    Preconditions:

    1. No model-local function outside of domain `sdc` (inline first): the bodies of `sdc` have no element type.
    2. No subgraphs.

    Attributes:
        islands: operators that compute in float32 together with what feeds them.
    """

    islands: frozenset[str] = frozenset({"Sin", "Cos"})
    name: ClassVar[str] = "cast-fp16"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Convert the whole graph; the match count is the number of values that are float16 now.

        Raises:
            PassError: a precondition does not hold.
        """
        _check_convertible(model)
        conversion = _Conversion(model.graph, _island_nodes(model.graph, self.islands))
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


def _check_convertible(model: ir.Model) -> None:
    foreign = [str(name) for name, function in model.functions.items() if function.domain != domain.DOMAIN]
    if foreign:
        raise PassError(
            f"cast-fp16: functions {foreign} have bodies of unknown types", hint="run inline-functions first"
        )
    for node in model.graph:
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            raise PassError(f"cast-fp16: {site(node)} holds a subgraph", hint="export the network without control flow")


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
        counts: figures for the report.
        twins: (value, element type) → the same value in that type.
    """

    graph: ir.Graph
    island: set[ir.Node]
    counts: Counter[str] = field(default_factory=Counter)
    twins: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)

    def convert_node(self, node: ir.Node) -> None:
        """Give `node` operands of the type that it computes in, and its outputs their new type."""
        version = self.graph.opset_imports.get(node.domain, 1)
        in_half = node not in self.island
        for index, value in enumerate(node.inputs):
            # Cast takes every type as it comes.
            if value is None or node.op_type == "Cast" or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                continue
            half = in_half and accepts_half(node, index, version)
            wanted = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
            if value.dtype != wanted:
                node.replace_input_with(index, self._in_type(value, wanted, before=node))
        if in_half:
            self._retype_attributes(node)
        for index, output in enumerate(node.outputs):
            dtype = output_dtype(node, index, version)
            self.counts["values"] += dtype == ir.DataType.FLOAT16 != output.dtype
            if dtype is not None:
                output.type = ir.TensorType(dtype)  # a clone shares its type object with the original

    def restore_outputs(self) -> None:
        """Give the graph's outputs back their type and their names."""
        for index, value in enumerate(self.graph.outputs):
            node = value.producer()
            if node is None or value.dtype != ir.DataType.FLOAT16:
                continue
            name = value.name
            value.name = f"{name}.float16"
            cast = _cast(value, ir.DataType.FLOAT)
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
                cast = _cast(value, wanted)
                self.graph.insert_before(before, cast)
                self.twins[key] = cast.outputs[0]
                self.counts["casts"] += 1
        return self.twins[key]

    def _half_initializer(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        half = half_from_tensor(value.const_value)
        self.counts["weights"] += 1
        self.counts["clamped"] += half.clamped
        self.counts["underflowed"] += half.underflowed
        twin = ir.Value(
            name=f"{value.name}.float16",
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=half.tensor,
        )
        self.graph.register_initializer(twin)
        return twin

    def _retype_attributes(self, node: ir.Node) -> None:
        name = _DTYPE_ATTRIBUTES.get(node.op_type, "") if node.domain == "" else ""
        if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT16:
            return  # asked for float32 where float16 is at hand: an island of the graph's author
        if name in node.attributes and node.attributes.get_int(name) == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT16)
        if node.op_type == "ConstantOfShape" and node.outputs[0].dtype == ir.DataType.FLOAT:
            fill = node.attributes["value"].as_tensor() if "value" in node.attributes else ir.tensor([0.0])
            node.attributes["value"] = ir.AttrTensor("value", half_from_tensor(fill).tensor)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype.value})
    output = node.outputs[0]
    output.name, output.shape, output.dtype = f"{value.name}.{dtype.name.lower()}", value.shape, dtype
    return node
