"""A fingerprint of what a graph computes, whatever its values are called: tells whether a pass changed anything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import onnx_ir as ir


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


class StructureDigests:
    """Digests of several graphs that share weights: every tensor object is read only once.

    Covered are operator sets, inputs, outputs, nodes in order with their attributes, and the weights that are used.
    Names of values and nodes are not. Passes only replace tensors, they never change one in place.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[ir.TensorProtocol, str]] = {}  # the tensor itself keeps its id from being reused

    def digest(self, model: ir.Model) -> str:
        """64 hexadecimal digits."""
        state = hashlib.sha256()
        _feed(state, sorted(model.opset_imports.items()))
        numbers: dict[int, str] = {}
        self._feed_graph(state, model.graph, numbers)
        for identifier in sorted(model.functions):
            function = model.functions[identifier]
            numbers = {id(value): f"parameter {index}" for index, value in enumerate(function.inputs)}
            _feed(state, [*identifier])
            self._feed_nodes(state, function, numbers)
            _feed(state, [self._token(value, numbers) for value in function.outputs])
        return state.hexdigest()

    def _feed_graph(self, state: _Hash, graph: ir.Graph, numbers: dict[int, str]) -> None:
        for value in graph.inputs:
            numbers[id(value)] = f"input {value.name}"
            _feed(state, [value.name, value.dtype, str(value.shape)])
        self._feed_nodes(state, graph, numbers)
        _feed(state, [(value.name, self._token(value, numbers)) for value in graph.outputs])

    def _feed_nodes(self, state: _Hash, nodes: Iterable[ir.Node], numbers: dict[int, str]) -> None:
        for node in nodes:
            _feed(state, [*node.op_identifier(), *(self._token(value, numbers) for value in node.inputs)])
            for output in node.outputs:
                numbers[id(output)] = f"value {len(numbers)}"
            for name in sorted(node.attributes):
                self._feed_attribute(state, node.attributes[name], numbers)

    def _feed_attribute(self, state: _Hash, attribute: ir.Attr, numbers: dict[int, str]) -> None:
        _feed(state, [attribute.name, attribute.type.name, attribute.ref_attr_name])
        if attribute.is_ref():
            return
        if attribute.type == ir.AttributeType.TENSOR:
            _feed(state, [self._tensor(attribute.as_tensor())])
        elif attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value
            for graph in graphs:
                self._feed_graph(state, graph, numbers)
        else:
            _feed(state, [attribute.value])

    def _token(self, value: ir.Value | None, numbers: dict[int, str]) -> str:
        if value is None:
            return "none"
        if value.const_value is not None and value.is_initializer():
            return f"weight {self._tensor(value.const_value)}"
        return numbers.setdefault(id(value), f"outer {len(numbers)}")

    def _tensor(self, tensor: ir.TensorProtocol) -> str:
        known = self._tensors.get(id(tensor))
        if known is None:
            state = hashlib.sha256(repr((tensor.dtype, str(tensor.shape))).encode())
            state.update(tensor.tobytes())
            known = self._tensors[id(tensor)] = (tensor, state.hexdigest())
        return known[1]


def _feed(state: _Hash, parts: Iterable[object]) -> None:
    state.update((repr(list(parts)) + "\n").encode())
