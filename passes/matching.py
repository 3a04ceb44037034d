"""Questions that patterns ask about values and nodes, and the one edit that fusions make."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import onnx_ir as ir

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
"""Element types that hold activations."""


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


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initialiser, not read from its file; None for everything that is computed or fed."""
    return None if value is None or value.is_graph_input() else value.const_value


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The contents of an initialiser; None for everything that is computed or fed."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


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
    replace_by_several(old, [new], outputs, new.outputs, at=at)


def replace_by_several(
    old: Sequence[ir.Node],
    new: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    new_outputs: Sequence[ir.Value],
    *,
    at: ir.Node,
) -> None:
    """Put `new` where `at` stands; `new_outputs` take over from `outputs`, and the last node has the name of `at`.

    Nodes of `old` that something else reads stay.
    """
    graph = at.graph
    assert graph is not None
    new[-1].name = at.name
    removed = _unread_without(old, outputs)
    ir.convenience.replace_nodes_and_values(graph, at, removed, list(new), list(outputs), list(new_outputs))


def _unread_without(old: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """Those of `old` that nothing reads once `outputs` are replaced, readers first."""
    gone: dict[ir.Node, None] = {}
    taken_over = set(outputs)
    candidates = list(dict.fromkeys(old))
    while True:
        found = [
            node
            for node in candidates
            if node not in gone
            and all(
                value in taken_over or (not value.is_graph_output() and all(user in gone for user in value.consumers()))
                for value in node.outputs
            )
        ]
        if not found:
            return list(gone)
        gone |= dict.fromkeys(found)


def scalar(value: ir.Value | None) -> float | None:
    """The number in an initialiser of one element; None for everything else."""
    tensor = constant_tensor(value)
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().item())


def permutation(transpose: ir.Node) -> tuple[int, ...]:
    """The order of a Transpose's axes; without one, all are reversed. Empty if the rank is unknown."""
    if "perm" in transpose.attributes:
        return tuple(transpose.attributes["perm"].as_ints())
    rank = len(dimensions(transpose.inputs[0]) or dimensions(transpose.outputs[0]) or ())
    return tuple(reversed(range(rank)))


def is_close(number: float | None, expected: float, dtype: ir.DataType | None) -> bool:
    """Whether a constant of the graph is `expected`, as well as its element type can say it."""
    # Four roundings: of the constant itself, and of those it was computed from.
    epsilon = 2.0**-10 if dtype == ir.DataType.FLOAT16 else 2.0**-23
    return number is not None and abs(number - expected) <= 4 * epsilon * abs(expected)


def unused_name(graph: ir.Graph, name: str) -> str:
    """`name`, or if an initialiser has it, a name that begins with it."""
    while name in graph.initializers:
        name += "_"
    return name


def add_initializer(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    """A new initialiser; its name begins with `name`."""
    unique = unused_name(graph, name)
    tensor = ir.tensor(array, name=unique)
    value = ir.Value(name=unique, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    value.const_value = tensor
    graph.register_initializer(value)
    return value


def through_casts(value: ir.Value | None) -> ir.Value | None:
    """`value` before conversions from one floating-point type to another."""
    while (cast := producer(value, "Cast")) is not None:
        source = cast.inputs[0]
        if source is None or source.dtype not in FLOATS or value is None or value.dtype not in FLOATS:
            break
        value = source
    return value
