"""How much work a graph is: multiply-adds of its matrix products, and the share of them that is quantised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from onnxscript.optimizer import fold_constants

from sdc.engines.errors import InputError, PassError
from sdc.passes.matching import add_initializer, constant, replace_by_several

_FOLDED_BYTES = 4096
"""Constants up to this size are folded: shapes, not weights."""

_PRESERVING = frozenset({"DequantizeLinear", "Cast", "Identity", "Reshape", "Transpose"})
"""What a constant may pass through and still be one."""


@dataclass(frozen=True)
class Product:
    """One matrix product.

    Attributes:
        site: name of its first output.
        operator: Conv, MatMul, Gemm or Attention.
        macs: multiply-adds.
        weighted: one operand is constant; otherwise it is a product of two activations, as in attention.
        quantised: both operands are dequantised integers.
    """

    site: str
    operator: str
    macs: int
    weighted: bool
    quantised: bool


@dataclass(frozen=True)
class MacCount:
    """The matrix products of a graph, at given sizes."""

    products: tuple[Product, ...]

    @property
    def weighted(self) -> int:
        """Multiply-adds with constants: convolutions and linear layers."""
        return sum(product.macs for product in self.products if product.weighted)

    @property
    def total(self) -> int:
        """All multiply-adds, attention's own products among them."""
        return sum(product.macs for product in self.products)

    @property
    def quantised(self) -> int:
        """Multiply-adds in integers."""
        return sum(product.macs for product in self.products if product.quantised)

    @property
    def quantised_share(self) -> float:
        """Quantised part of the multiply-adds with constants, 0 to 1."""
        return self.quantised / self.weighted if self.weighted else 0.0

    @property
    def quantised_share_of_total(self) -> float:
        """Quantised part of all multiply-adds, attention's own products among them, 0 to 1."""
        return self.quantised / self.total if self.total else 0.0


def count_macs(model: ir.Model, sizes: Mapping[str, int]) -> MacCount:
    """Count the multiply-adds of Conv, MatMul, Gemm and Attention, functions inlined. `model` is not changed.

    Args:
        model: quantised or not.
        sizes: a size for every symbol in the shapes of the graph's inputs.

    Raises:
        InputError: a symbol has no size.
        PassError: the shape of a product's operand does not follow from the inputs.
    """
    flat = InlinePass()(model.clone()).model
    shapes = static_shapes(flat, sizes)
    return MacCount(
        tuple(
            Product(
                site=node.outputs[0].name or "",
                operator=node.op_type,
                macs=_macs_of(node, shapes),
                weighted=node.op_type != "Attention" and any(map(_is_constant, node.inputs[:2])),
                quantised=node.op_type != "Attention" and all(map(_is_dequantised, node.inputs[:2])),
            )
            for node in flat.graph
            if node.op_type in ("Conv", "MatMul", "Gemm", "Attention") and not node.domain
        )
    )


def static_shapes(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes by value name: sizes go into the inputs, and constant folding carries them through the graph.

    Functions are inlined; what they hold has names of its own. `model` is not changed.

    Raises:
        InputError: a symbol has no size.
        PassError: an input has no known rank.
    """
    bound = InlinePass()(model.clone()).model
    for value in bound.graph.inputs:
        value.shape = _bound_shape(value, sizes)
    for node in list(bound.graph):
        for output in node.outputs:
            output.shape = None
        if node.op_type == "Split":
            _cut_by_slices(node)
        # ONNX infers no shapes through these; they keep their input's, and a norm its type, which need not be known.
        if node.op_type == "GroupNormalization":
            _replace(node, "Identity")
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _replace(node, "Cast")
            node.attributes["to"] = ir.AttrInt64("to", node.outputs[0].dtype or ir.DataType.FLOAT)
    fold_constants(bound, onnx_shape_inference=True, input_size_limit=_FOLDED_BYTES, output_size_limit=_FOLDED_BYTES)
    values = [*bound.graph.inputs, *bound.graph.initializers.values(), *(o for n in bound.graph for o in n.outputs)]
    return {
        value.name or "": tuple(int(size) for size in value.shape.numpy())
        for value in values
        if value.shape is not None and value.shape.is_static()
    }


def _bound_shape(value: ir.Value, sizes: Mapping[str, int]) -> ir.Shape:
    if value.shape is None:
        raise PassError(f"input {value.name!r} has no known rank", hint="export it with a shape")
    missing = value.shape.free_symbols() - set(sizes)
    if missing:
        raise InputError(f"no size for {sorted(missing)} of input {value.name!r}", hint="give a size for every symbol")
    return value.shape.evaluate(sizes)


def _cut_by_slices(split: ir.Node) -> None:
    """Replace a Split into constant sizes by Slices: constant folding infers no shapes from more than some 20 sizes.

    Source: onnxscript 0.7.2, optimizer/_constant_folding.py: shape inference is given small constants only.
    """
    graph, sizes = split.graph, constant(split.inputs[1] if len(split.inputs) > 1 else None)
    if graph is None or sizes is None:
        return
    ends = np.cumsum(sizes)
    axis = add_initializer(graph, np.array([split.attributes.get_int("axis", 0)]), f"{split.name}.axis")
    slices = []
    for begin, end in zip(ends - sizes, ends, strict=True):
        limits = [add_initializer(graph, np.array([limit]), f"{split.name}.limit") for limit in (begin, end)]
        slices.append(ir.node("Slice", [split.inputs[0], *limits, axis]))
    replace_by_several([split], slices, split.outputs, [each.outputs[0] for each in slices], at=split)


def _replace(node: ir.Node, op_type: str) -> None:
    node.op_type = op_type
    node.resize_inputs(1)
    node.attributes.clear()


def _macs_of(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    def shape_of(value: ir.Value | None) -> tuple[int, ...]:
        name = "" if value is None else value.name or ""
        if name not in shapes:
            raise PassError(f"no static shape for {name!r} at {node.op_type} {node.outputs[0].name!r}")
        return shapes[name]

    result = math.prod(shape_of(node.outputs[0]))
    if node.op_type == "Conv":
        return result * math.prod(shape_of(node.inputs[1])[1:])
    if node.op_type == "MatMul":
        return result * shape_of(node.inputs[0])[-1]
    if node.op_type == "Gemm":
        return result * shape_of(node.inputs[0])[0 if node.attributes.get_int("transA") else 1]
    # Attention: every query element meets every key (Q·Kᵀ), and every result element sums over every value (P·V).
    return (math.prod(shape_of(node.inputs[0])) + result) * shape_of(node.inputs[1])[-2]


def _is_constant(value: ir.Value | None) -> bool:
    """An initialiser or Constant, or what a DequantizeLinear or a layout change makes of one."""
    while value is not None and ir.convenience.get_const_tensor(value) is None:
        node = value.producer()
        if node is None or node.op_type not in _PRESERVING:
            return False
        value = node.inputs[0]
    return value is not None


def _is_dequantised(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type == "DequantizeLinear"
