"""Which of a graph's inputs the numbers of each value depend on."""

from __future__ import annotations

import onnx_ir as ir

_SHAPE_ONLY = frozenset({"Shape", "Size"})


def inputs_behind_values(graph: ir.Graph) -> dict[ir.Value, frozenset[ir.Value]]:
    """For every input and every computed value, the inputs that its numbers depend on.

    What only a tensor's shape depends on does not count: behind the result of a Shape there is no input. A call of a
    function depends on all that it is given, a node with a subgraph on every input.
    """
    everything = frozenset(graph.inputs)
    behind = {value: frozenset({value}) for value in graph.inputs}
    for node in graph:
        found: frozenset[ir.Value] = frozenset()
        if _has_subgraph(node):
            found = everything
        elif node.domain or node.op_type not in _SHAPE_ONLY:
            found = found.union(*(behind.get(value, found) for value in node.inputs if value is not None))
        behind.update(dict.fromkeys(node.outputs, found))
    return behind


def _has_subgraph(node: ir.Node) -> bool:
    return any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    )
