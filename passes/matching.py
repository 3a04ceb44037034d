"""Questions that patterns ask about values and nodes, and the one edit that fusions make."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import onnx_ir as ir


def is_operator(node: ir.Node | None, op_type: str) -> bool:
    """Whether `node` is the standard ONNX operator `op_type`."""
    return node is not None and node.domain == "" and node.op_type == op_type


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node behind `value` if it is the standard operator `op_type`, and None otherwise."""
    node = None if value is None else value.producer()
    return node if is_operator(node, op_type) else None


def consumers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read `value`, each once, in graph order of use; the graph's outputs are not among them."""
    return list(dict.fromkeys(value.consumers()))


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The only node that reads `value`; None if there are several, none, or if it is a graph output as well."""
    nodes = consumers(value)
    return nodes[0] if len(nodes) == 1 and not value.is_graph_output() else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The contents of an initialiser; None for everything that is computed or fed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def site(node: ir.Node) -> str:
    """How a report calls `node`."""
    return node.name or f"{node.op_type}({node.outputs[0].name})"


def dimensions(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    """Sizes of `value`, a symbol's text for a free one, None for an unknown one; None if the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def same_size(a: int | str | None, b: int | str | None) -> bool:
    """Whether two sizes are known to be equal, as texts or as expressions: ``2*H`` and ``H + H``."""
    if a is None or b is None or isinstance(a, int) or isinstance(b, int):
        return a is not None and a == b
    return a == b or _same_expression(a, b)


@cache
def _same_expression(a: str, b: str) -> bool:
    try:
        return (ir.SymbolicDim(a) - ir.SymbolicDim(b)).simplify().value == "0"
    except ValueError:  # a name that is no expression, such as "batch size"
        return False


def replace_nodes(old: Sequence[ir.Node], new: ir.Node, outputs: Sequence[ir.Value], *, at: ir.Node) -> None:
    """Put `new` where `at` stands and let its outputs take over from `outputs`: names, types, shapes and readers.

    Args:
        old: nodes to remove, `at` among them; nothing but each other and the readers of `outputs` may read them.
        new: the node that replaces them.
        outputs: the values that the outputs of `new` replace, in order.
        at: the node whose place `new` takes.
    """
    graph = at.graph
    assert graph is not None
    new.name = at.name
    ir.convenience.replace_nodes_and_values(graph, at, list(old), [new], list(outputs), list(new.outputs))
