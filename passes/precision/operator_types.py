"""What an operator's schema says about the element types of its operands and results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import onnx
import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes import domain

_NAMES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


def accepts(node: ir.Node, index: int, version: int, dtype: ir.DataType) -> bool:
    """Whether operand `index` of `node` may have the 16-bit type `dtype` in version `version` of the operator's domain.

    Raises:
        PassError: the operator has no schema.
    """
    if node.domain == domain.DOMAIN:
        return True
    return _NAMES[dtype] in _parameter(_schema(node, version).inputs, index).types


def output_dtype(node: ir.Node, index: int, version: int) -> ir.DataType | None:
    """Element type of output `index`, from the operands that the node has now; None if nothing determines it.

    Raises:
        PassError: the operator has no schema.
    """
    if node.domain == domain.DOMAIN:
        first = node.inputs[0]
        return None if first is None else first.dtype
    schema = _schema(node, version)
    for attribute in ("to", "dtype", "output_dtype"):
        if attribute in schema.attributes and (named := node.attributes.get_int(attribute, 0)):
            return ir.DataType(named)
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().dtype
    variable = _parameter(schema.outputs, index).type_str
    if node.op_type == "DequantizeLinear":
        # Source: ONNX DequantizeLinear-23: without output_dtype the result has the scale's type.
        variable = schema.inputs[1].type_str
    for position, value in enumerate(node.inputs):
        if value is not None and _parameter(schema.inputs, position).type_str == variable:
            return value.dtype
    return node.outputs[index].dtype


def _parameter(
    parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int
) -> onnx.defs.OpSchema.FormalParameter:
    """The formal parameter at `index`; the last one stands for all further ones of a variadic operator."""
    return parameters[min(index, len(parameters) - 1)]


def _schema(node: ir.Node, version: int) -> onnx.defs.OpSchema:
    try:
        return _load_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError as error:
        raise PassError(
            f"operator {node.domain or 'ai.onnx'}.{node.op_type}, version {version}, has no schema",
            hint="precision passes come before lowering to a backend's own operators",
        ) from error


@cache
def _load_schema(op_type: str, version: int, operator_domain: str) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(op_type, version, operator_domain)
