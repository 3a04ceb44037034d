"""A fingerprint of a graph: what calibration is tied to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import onnx_ir as ir


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def digest_from_model(model: ir.Model) -> str:
    """SHA-256 of everything that decides what the graph computes and how its tensors are called.

    Covered are operator sets, inputs, outputs, nodes in order with attributes and value names, model-local functions,
    and the bytes of every initialiser. Node names, documentation and metadata are not.

    Returns:
        64 hexadecimal digits.
    """
    state = hashlib.sha256()
    _feed(state, sorted(model.opset_imports.items()))
    for value in (*model.graph.inputs, *model.graph.outputs):
        _feed(state, [value.name, value.dtype, str(value.shape)])
    for name in sorted(model.graph.initializers):
        tensor = model.graph.initializers[name].const_value
        _feed(state, [name])
        if tensor is not None:
            _feed_tensor(state, tensor)
    _feed_nodes(state, model.graph)
    for identifier in sorted(model.functions):
        function = model.functions[identifier]
        _feed(state, [*identifier, *(value.name for value in (*function.inputs, *function.outputs))])
        _feed_nodes(state, function)
    return state.hexdigest()


def _feed_nodes(state: _Hash, nodes: Iterable[ir.Node]) -> None:
    for node in nodes:
        names = [None if value is None else value.name for value in node.inputs]
        _feed(state, [*node.op_identifier(), *names, "->", *(value.name for value in node.outputs)])
        for name in sorted(node.attributes):
            _feed_attribute(state, node.attributes[name])


def _feed_attribute(state: _Hash, attribute: ir.Attr) -> None:
    _feed(state, [attribute.name, attribute.type.name, attribute.ref_attr_name])
    if attribute.is_ref():
        return
    if attribute.type == ir.AttributeType.TENSOR:
        _feed_tensor(state, attribute.as_tensor())
    elif attribute.type == ir.AttributeType.GRAPH:
        _feed_nodes(state, attribute.as_graph())
    elif attribute.type == ir.AttributeType.GRAPHS:
        for graph in attribute.as_graphs():
            _feed_nodes(state, graph)
    else:
        _feed(state, [attribute.value])


def _feed_tensor(state: _Hash, tensor: ir.TensorProtocol) -> None:
    _feed(state, [tensor.dtype, str(tensor.shape)])
    state.update(tensor.tobytes())


def _feed(state: _Hash, parts: Iterable[object]) -> None:
    """Parts are kept apart by their `repr`, which quotes and escapes strings."""
    state.update((repr(list(parts)) + "\n").encode())
