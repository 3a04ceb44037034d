"""observe-activations: let a graph tell what its tensors hold, in a few small extra outputs."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes.base import Pass, PassReport

MINIMA, MAXIMA, MEANS = "observed.minima", "observed.maxima", "observed.means"
"""Names of three extra outputs: float32, one for each channel of each tensor, one tensor after the other."""

_SAMPLES = "observed.samples"

_CHANNEL_FACTORS = 2 * 3 * 5 * 7
"""Numbers of channels are made of these primes: steps through memory that share none with it meet every channel."""

_MOST_SKIPPED = 4096


@dataclass(frozen=True)
class Observed:
    """A tensor to watch.

    Attributes:
        name: of the value.
        channels: number of its channels.
        spatial_axes: number of axes behind that of the channels.
        sampled: whether values are handed out, and not the channels' statistics alone.
    """

    name: str
    channels: int
    spatial_axes: int = 0
    sampled: bool = True


def samples_name(index: int) -> str:
    """Name of the output with values of the tensor number `index`: float32, [at most `sample_limit`]."""
    return f"{_SAMPLES}.{index}"


@dataclass(frozen=True)
class ObserveActivations(Pass):
    """The graph gains outputs with each tensor's channel statistics, and with an even part of its values.

    Before → after::

        x  →  x; observed.minima = Concat(ReduceMin(x over all axes but the channels), ...)
                 observed.maxima, observed.means likewise
                 observed.samples.0 = Slice(Reshape(x, [-1]), step k)

    1. Every tensor is an input of the graph or the output of a node of the main graph.

    Minima, maxima and means are those of all values: the reductions happen inside the run. Of a tensor with more than
    `sample_limit` values, every k-th is handed out, k being the smallest number of no small prime factor that keeps the
    limit: the same values for the same sizes. What reads a tensor stands directly behind the node that writes it: in
    this order nothing is held longer than it was.

    Attributes:
        tensors: in the order of the outputs.
        sample_limit: values handed out of each tensor in one run.
    """

    name: ClassVar[str] = "observe-activations"

    tensors: tuple[Observed, ...]
    sample_limit: int = 2**16

    def rewrite(self, model: ir.Model) -> PassReport:
        """Add the outputs.

        Raises:
            PassError: a tensor is not in the main graph, or none is named.
        """
        graph = model.graph
        values = {value.name: value for value in graph.inputs}
        values.update({value.name: value for node in graph for value in node.outputs})
        missing = [each.name for each in self.tensors if each.name not in values]
        if missing or not self.tensors:
            raise PassError(f"cannot observe {len(missing)} of {len(self.tensors)} tensors: {missing[:3]}")
        writer = _Writer(graph, self.sample_limit)
        for index, each in enumerate(self.tensors):
            writer.observe(values[each.name], each, index)
        writer.join()
        return PassReport(self.name, len(self.tensors))


class _Writer:
    """The nodes that one application adds."""

    def __init__(self, graph: ir.Graph, limit: int) -> None:
        self._graph = graph
        self._nodes: list[ir.Node] = []
        self._rows: dict[str, list[ir.Value]] = {MINIMA: [], MAXIMA: [], MEANS: []}
        self._flat = self._constant("flat", [-1])
        self._begin = self._constant("begin", [0])
        self._end = self._constant("end", [np.iinfo(np.int64).max])
        self._limit = self._constant("limit", [limit])
        self._last = self._constant("last", [_MOST_SKIPPED])
        self._strides = self._constant("strides", strides(_MOST_SKIPPED))

    def observe(self, value: ir.Value, tensor: Observed, index: int) -> None:
        """Add one tensor's reductions and its samples."""
        axes = self._constant(f"axes.{index}", [0, *range(2, 2 + tensor.spatial_axes)])
        rows = value
        if not tensor.spatial_axes:  # any number of axes may stand before
            rows = self._add("Reshape", [value, self._constant(f"rows.{index}", [-1, tensor.channels])])
        for name, operator in ((MINIMA, "ReduceMin"), (MAXIMA, "ReduceMax"), (MEANS, "ReduceMean")):
            self._rows[name].append(self._add(operator, [rows, axes], {"keepdims": 0}))
        if tensor.sampled:
            flat = self._add("Reshape", [value, self._flat])
            times = self._add("Div", [self._add("Shape", [flat]), self._limit])
            stride = self._add("Gather", [self._strides, self._add("Min", [times, self._last])])
            samples = self._add("Slice", [flat, self._begin, self._end, self._begin, stride])
            self._output(samples, samples_name(index))
        self._place_behind(value)

    def join(self) -> None:
        """Put the reductions of all tensors behind each other."""
        for name, rows in self._rows.items():
            self._output(self._add("Concat", rows, {"axis": 0}), name)
        self._graph.extend(self._nodes)

    def _place_behind(self, value: ir.Value) -> None:
        """Put the nodes added since the last time behind the one that writes `value`; those of an input in front."""
        writer = value.producer()
        if writer is None:
            self._graph.insert_before(self._graph[0], self._nodes)
        else:
            self._graph.insert_after(writer, self._nodes)
        self._nodes = []

    def _add(self, operator: str, inputs: list[ir.Value], attributes: dict[str, int] | None = None) -> ir.Value:
        node = ir.node(operator, inputs, attributes or {})
        self._nodes.append(node)
        return node.outputs[0]

    def _output(self, value: ir.Value, name: str) -> None:
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape([None])
        self._graph.outputs.append(value)

    def _constant(self, name: str, numbers: list[int]) -> ir.Value:
        value = ir.Value(name=f"observed.{name}", const_value=ir.tensor(np.array(numbers, np.int64)))
        self._graph.register_initializer(value)
        return value


def strides(last: int) -> list[int]:
    """For each quotient n of size and limit up to `last`, a step that leaves at most `limit` values."""
    found = [1]
    for quotient in range(1, last + 1):
        step = quotient + 1
        while gcd(step, _CHANNEL_FACTORS) > 1:
            step += 1
        found.append(step)
    return found
