"""The place of every multiplication in a denoising network, found from the shape of the graph alone.

The graph is looked at with its model-local functions inlined, so that a fused graph and a plain one give the same
roles. Inputs are told apart by rank: pictures have four axes, token sequences three, the timestep and its
conditions fewer.
"""

from __future__ import annotations

from enum import StrEnum

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from sdc.engines.errors import PassError
from sdc.passes.dependence import inputs_behind_values

PICTURE_RANK = 4
SEQUENCE_RANK = 3

LAYOUT = frozenset(
    {
        "Cast",
        "Identity",
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "QuantizeLinear",
        "DequantizeLinear",
    }
)
"""Operators that move or retype values without mixing them."""

_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})

_STREAM = frozenset({"Add", "Sum", "Concat", "Conv", "Resize"})
"""Producers of a residual stream: nothing bounds what they write."""


class Role(StrEnum):
    """The place of a layer in the network."""

    TIMESTEP = "timestep"
    PROMPT = "prompt"
    INPUT = "input"
    OUTPUT = "output"
    SHORTCUT = "shortcut"
    PROJECTION_OUT = "projection-out"
    INTERIOR = "interior"


def roles_from_model(model: ir.Model) -> dict[str, Role]:
    """Role of every Conv, MatMul and Gemm of the graph, functions inlined, by the name of its first output.

    1. Its activation depends on no picture: ``PROMPT`` if it depends on a token sequence, else ``TIMESTEP``. What only
       a tensor's shape depends on does not count.
    2. Its activation is a graph input: ``INPUT``. Its result is a graph output: ``OUTPUT``.
    3. It is pointwise (a matrix, or a convolution of kernel 1) and reads a residual stream that no normalisation,
       activation or attention has bounded: ``SHORTCUT`` if others read that stream too (the residual block's first
       norm does), else ``PROJECTION_OUT``.
    4. Anything else: ``INTERIOR``.

    Layout changes, scalings by a constant and additions of a constant are looked through.

    Raises:
        PassError: an input of the graph has no known rank.
    """
    flat = InlinePass()(model.clone()).model
    ranks = _ranks_behind_values(flat.graph)
    return {
        node.outputs[0].name or "": _role_of(node, ranks)
        for node in flat.graph
        if node.op_type in ("Conv", "MatMul", "Gemm") and not node.domain
    }


def _ranks_behind_values(graph: ir.Graph) -> dict[ir.Value, frozenset[int]]:
    """For every value, the ranks of the graph inputs that its numbers depend on."""
    for value in graph.inputs:
        if value.shape is None:
            raise PassError(f"input {value.name!r} has no known rank", hint="export it with a shape")
    return {
        value: frozenset(len(each.shape) for each in inputs if each.shape is not None)
        for value, inputs in inputs_behind_values(graph).items()
    }


def _role_of(node: ir.Node, ranks: dict[ir.Value, frozenset[int]]) -> Role:
    activation = node.inputs[0]
    assert activation is not None  # required by the operators
    behind = ranks.get(activation, frozenset())
    if PICTURE_RANK not in behind:
        return Role.PROMPT if SEQUENCE_RANK in behind else Role.TIMESTEP
    source = _source_of(activation)
    if source.is_graph_input():
        return Role.INPUT
    if _reaches_output(node.outputs[0]):
        return Role.OUTPUT
    producer = source.producer()
    if _is_pointwise(node) and producer is not None and producer.op_type in _STREAM:
        return Role.SHORTCUT if len(source.consumers()) > 1 else Role.PROJECTION_OUT
    return Role.INTERIOR


def _source_of(value: ir.Value) -> ir.Value:
    """Walk back to the operator that last mixed values."""
    while (node := value.producer()) is not None and (behind := _looked_through(node)) is not None:
        value = behind
    return value


def _reaches_output(value: ir.Value) -> bool:
    while not value.is_graph_output():
        consumers = list(value.consumers())
        if len(consumers) != 1 or _looked_through(consumers[0]) is not value:
            return False
        value = consumers[0].outputs[0]
    return True


def _looked_through(node: ir.Node) -> ir.Value | None:
    """The one input whose numbers the node passes on, or None if it mixes several."""
    if node.op_type in LAYOUT:
        return node.inputs[0]
    if node.op_type in _ARITHMETIC:
        varying = [value for value in node.inputs if value is not None and not _is_constant(value)]
        return varying[0] if len(varying) == 1 else None
    return None


def _is_constant(value: ir.Value) -> bool:
    return ir.convenience.get_const_tensor(value) is not None


def _is_pointwise(node: ir.Node) -> bool:
    if node.op_type != "Conv":
        return True
    weight = node.inputs[1]
    return weight is not None and weight.shape is not None and all(size == 1 for size in weight.shape[2:])
