"""deepcache: a UNet in two, so that most steps run only what is near its input and its output.

The deep features of a UNet change little from one step to the next. With g the layers behind one of its skip
connections and u what the layers inside of it give,

    unet(x, s, c) = g(x, s, c, u(x, s, c))        most steps use  g(x', s', c, u)  with u from a step before

Source: Ma, Fang and Wang, "DeepCache: Accelerating Diffusion Models for Free", arXiv:2312.00858, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sdc.engines.errors import InputError, PassError
from sdc.passes.base import PassReport, run_passes
from sdc.passes.domain import CONCAT_GROUP_NORM_SILU, is_fused
from sdc.passes.hoisting.crossing import describe, free_names, give_out, read_sizes_of, take_in
from sdc.passes.hoisting.hoist_split import TIDYING
from sdc.passes.matching import dimensions, is_operator, site

DEEP = "deep"
"""What the tensor that crosses is called, with a number behind it."""

_TYPE_CHANGES = ("Cast", "QuantizeLinear", "DequantizeLinear")
"""Operators that give what they are given in another type."""

_IMAGE_RANK = 4


@dataclass(frozen=True)
class SkipConnection:
    """Where a tensor meets one that it was computed from.

    Attributes:
        join: the node that joins the two along the channels.
        deep: the operand that the layers inside of the skip connection gave: [B, C, H, W].
        skip: the operand that went around them: [B, another C, H, W].
    """

    join: ir.Node
    deep: ir.Value
    skip: ir.Value


@dataclass(frozen=True)
class Cached:
    """The two graphs of a UNet with DeepCache.

    Attributes:
        shallow: takes the deep features and gives what the whole gives.
        full: the value that the whole gives beside it; likewise `taken`, the input of the shallow graph.
        report: as of a pass; the number matched is that of the nodes that the shallow graph leaves out.
    """

    shallow: ir.Model
    full: ir.Value
    taken: ir.Value
    report: PassReport


def split_deep(model: ir.Model, depth: int = 0) -> Cached:
    """Let a UNet give its deep features, in place, and make the graph that takes them in place of computing them.

    Before → after::

        unet(sample, …) = out_sample   →  unet(sample, …) = out_sample, deep.0
                                          shallow(sample, …, deep.0) = out_sample

    1. A skip connection is a Concat, or a fused operator that begins with one, of two tensors [B, C, H, W] along the
       channels, one of which was computed from the other; that it was cast or quantised on the way does not matter.
       The former are the deep features, the latter the skip.
    2. They are counted from the output: depth 0 is the last one, whose shallow graph is the smallest.
    3. The deep features are float32 between the graphs. An inner float16 is cast on both sides, which changes no value.
    4. Inputs that the shallow graph does not read are none of its inputs. Weights that it reads are in both graphs.
    5. Sizes that it reads of tensors inside are read of an input or of the deep features, which have the same.

    Args:
        model: a UNet whose values have types and shapes, of any precision, fused or not, hoisted or not.
        depth: which skip connection, from 0.

    Raises:
        InputError: there are fewer skip connections.
        PassError: there is none; the size of the deep features is unknown; or the shallow graph would compute them, or
            what they are computed from, all the same: it reads it by another way than the skip, or reads its size.
    """
    graph = model.graph
    connections = find_skip_connections(graph)
    if not connections:
        raise PassError(
            "DeepCache needs a skip connection: a Concat along the channels of two tensors [B, C, H, W], one of which "
            "was computed from the other. This graph has none",
            hint="export without --deepcache",
        )
    if not 0 <= depth < len(connections):
        raise InputError(
            f"DeepCache at depth {depth}: this UNet has {len(connections)} skip connections",
            hint=f"choose a depth from 0 to {len(connections) - 1}; the smallest is the fastest",
        )
    nodes_before = len(graph)
    chosen = connections[-1 - depth]
    name = next(free_names(graph, DEEP))
    shape = _shape_of_deep(chosen)
    shallow, taken = _shallow_graph(model, chosen, name, shape)
    full = give_out(graph, chosen.deep, name)
    full.shape = shape
    graph.outputs.append(full)
    report = PassReport("deepcache", nodes_before - len(shallow.graph), (), nodes_before, len(shallow.graph))
    return Cached(shallow, full, taken, report)


def find_skip_connections(graph: ir.Graph) -> list[SkipConnection]:
    """All skip connections, in the order of the graph: from the deepest to the one next to the output."""
    found = []
    for node in graph:
        if not _joins_channels(node):
            continue
        for deep, skip in (node.inputs[:2], node.inputs[1::-1]):
            assert deep is not None
            assert skip is not None
            if _is_computed_from(deep, skip):
                found.append(SkipConnection(node, deep, skip))
    return found


def _joins_channels(node: ir.Node) -> bool:
    """Whether a node joins two tensors [B, C, H, W] along the channels."""
    if is_fused(node, CONCAT_GROUP_NORM_SILU):
        return True
    if not is_operator(node, "Concat") or len(node.inputs) != 2:
        return False
    ranks = {len(dimensions(value) or ()) for value in node.inputs}
    return ranks == {_IMAGE_RANK} and node.attributes["axis"].as_int() in (1, 1 - _IMAGE_RANK)


def _is_computed_from(deep: ir.Value, skip: ir.Value) -> bool:
    """Whether numbers of the one, not only its size, depend on the other."""
    source = _before_type_changes(skip)
    if source is _before_type_changes(deep):
        return False
    producer = source.producer()
    siblings = {source} if producer is None else set(producer.outputs)
    readers = (node for node in nodes_behind([deep], through_sizes=False) if not is_operator(node, "Shape"))
    return any(not siblings.isdisjoint(node.inputs) for node in readers)


def _before_type_changes(value: ir.Value) -> ir.Value:
    while (node := value.producer()) is not None and not node.domain and node.op_type in _TYPE_CHANGES:
        assert node.inputs[0] is not None
        value = node.inputs[0]
    return value


def nodes_behind(values: list[ir.Value], *, through_sizes: bool = True) -> set[ir.Node]:
    """All nodes that values are computed by; without those whose results' sizes alone are read, if so wanted."""
    found: set[ir.Node] = set()
    pending = [value.producer() for value in values]
    while pending:
        node = pending.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if through_sizes or not is_operator(node, "Shape"):
            pending.extend(value.producer() for value in node.inputs if value is not None)
    return found


def _shape_of_deep(chosen: SkipConnection) -> ir.Shape:
    """What is joined differs in the channels only; the sizes of the skip are the simpler expressions."""
    deep, skip = dimensions(chosen.deep), dimensions(chosen.skip)
    if deep is None or skip is None or not isinstance(deep[1], int) or None in (skip[0], *skip[2:]):
        raise PassError(
            f"the size of the deep features at {site(chosen.join)} is unknown: {deep}, joined with {skip}",
            hint="run infer-shapes first",
        )
    return ir.Shape([skip[0], deep[1], *skip[2:]])


def _shallow_graph(model: ir.Model, chosen: SkipConnection, name: str, shape: ir.Shape) -> tuple[ir.Model, ir.Value]:
    """A copy that reads the deep features from an input called `name`, without what is not needed then."""
    copy = model.clone()
    graph = copy.graph
    place = next(index for index, node in enumerate(model.graph) if node is chosen.join)
    deep = graph[place].inputs[chosen.join.inputs.index(chosen.deep)]
    assert deep is not None
    assert deep.dtype is not None
    before = deep.producer()
    taken = describe(ir.Value(), name, shape, ir.DataType.FLOAT)
    inside = take_in(graph, taken, deep.dtype, before=graph[0])
    _read_sizes_elsewhere(graph, deep)
    ir.convenience.replace_all_uses_with(deep, inside)
    graph.inputs.append(taken)
    outputs = list(graph.outputs)
    if before in nodes_behind(outputs):
        raise PassError(
            f"the deep features at {site(chosen.join)} would be computed in the shallow graph too: it reads what they "
            "are computed from by another way than the skip connection",
            hint="choose another depth",
        )
    for_sizes = nodes_behind(outputs) - nodes_behind(outputs, through_sizes=False)
    if for_sizes:
        raise PassError(
            f"the shallow graph reads sizes of tensors that only the deep layers compute, with {len(for_sizes)} nodes",
            hint="choose another depth, or export with fused operators",
        )
    graph.name = "shallow"
    run_passes(TIDYING, copy)
    for value in [each for each in graph.inputs if not each.uses() and not each.is_graph_output()]:
        graph.inputs.remove(value)
    return copy, taken


def _read_sizes_elsewhere(graph: ir.Graph, deep: ir.Value) -> None:
    """Let every Shape of a tensor that deep layers compute read the same sizes of an input or of the deep features.

    Equal sizes are read at one place of a graph, wherever that is.
    """
    layers = nodes_behind([deep])
    for node in graph:
        if not is_operator(node, "Shape") or node.inputs[0] is None or node.inputs[0].producer() not in layers:
            continue
        read_sizes_of(node, (*graph.inputs, deep))
