"""State every shape that follows from the inputs' shapes, and compute shape arithmetic away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport
from sdc.passes.shapes.shape_rules import whole_shape
from sdc.passes.shapes.size_contents import Contents, computed_contents, initial_contents
from sdc.passes.shapes.size_vectors import SizeVectors
from sdc.passes.shapes.stated_types import fresh_symbols, input_symbols, state_types


@dataclass(frozen=True)
class ResolveShapes(Pass):
    """Every value has a type and a shape as far as they can be known, in symbols of the inputs' free sizes.

    Exporters differ in how they compute the target of a Reshape: by Shape, Gather, Div and Concat (TorchScript), or
    partly in advance (dynamo). Here sizes are followed through the graph as expressions, and whatever is known of a
    target is written into it.

    Before → after::

        i = any arithmetic on sizes, all results known    →  initialiser i
        Reshape(x: [B, S, 320], Concat(B, -1, 8, 40))     →  Reshape(x, [0, 0, 8, 40])
        Reshape(x: [B, S, C], Concat(B, H, W, C))         →  Reshape(x, Concat([0], Shape(z, start=2, end=4), [C]))
        Expand(x: [B, C], [B, C])                         →  x

    ``z`` is the first value of the graph that has the wanted sizes next to each other, so equal targets become equal
    nodes. Where an exporter stated a size in symbols of the inputs, or as a number, its statement stays: it may know
    relations between free sizes that inference does not. Symbols that belong to no input are replaced: the TorchScript
    exporter gives one name to different sizes. A size that nothing determines gets a symbol of its own.

    Preconditions of a new target:

    1. The shapes of operand and result are known.
    2. Each size is a number, or stands at the same place in the operand (0), or is the only one left (-1), or a value
       that is computed before has it.

    Not matched: targets with sizes that no value has; operators that hold subgraphs.
    """

    name: ClassVar[str] = "resolve-shapes"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Resolve; the match count is the number of values that became constants and of targets that were rewritten."""
        graph = model.graph
        version = model.graph.opset_imports.get("", 1)
        fresh = fresh_symbols(graph)
        inputs = input_symbols(graph)
        contents: dict[ir.Value, Contents] = {}
        for value in graph.initializers.values():
            _note(contents, value, initial_contents(value))
        sources = SizeVectors(graph, contents)
        folded = rewritten = 0
        for node in list(graph):
            state_types(node, contents, version, inputs, fresh)
            shape = whole_shape(node.outputs[0])
            if node.domain == "" and shape is not None:
                _note(contents, node.outputs[0], computed_contents(node, contents, shape))
            constant = _fold(graph, node, contents.get(node.outputs[0]))
            if constant is not None:
                contents[constant] = contents[node.outputs[0]]
                folded += 1
            else:
                rewritten += sources.rewrite_target(node)
            sources.add(node)
        return PassReport(name=self.name, matched=folded + rewritten, details={"folded": folded, "targets": rewritten})


def _note(contents: dict[ir.Value, Contents], value: ir.Value, held: Contents | None) -> None:
    if held is not None:
        contents[value] = held


def _fold(graph: ir.Graph, node: ir.Node, held: Contents | None) -> ir.Value | None:
    """Replace a node by an initialiser if its result is known in full."""
    value = node.outputs[0]
    if held is None or value.is_graph_output() or not all(isinstance(each, int) for each in held.flat):
        return None
    assert value.dtype is not None
    constant = ir.Value(name=value.name, type=value.type, shape=ir.Shape(held.shape))
    constant.const_value = ir.tensor(np.asarray(held, dtype=value.dtype.numpy()), name=value.name)
    ir.convenience.replace_all_uses_with(value, constant)
    graph.remove(node, safe=True)
    graph.register_initializer(constant)
    return constant
