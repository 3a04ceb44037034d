"""The activations of an engine as ONNX Runtime's CPU provider has them in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from sdc.passes.matching import producer
from sdc.passes.memory.buffers import SizedGraph, Step

_FLOAT32_BYTES = 4
_IN_PLACE = frozenset({"Relu", "Sigmoid", "Tanh"})
"""Element-wise operators that write over their operand, without reuse of memory for equal shapes.

Source: ONNX Runtime 1.31, high-water marks of chains of each; Add, Mul and others have memory of their own.
"""


def expanded_weights(graph: ir.Graph) -> dict[str, int]:
    """Weights of integers that are expanded to float32 in every run: their bytes then, by what their product writes.

    It is so where a product's other operand is no integer either, and no kernel takes weights alone in integers, as
    MatMulNBits does those of a MatMul, and of a Gemm that does not transpose them.
    """
    expanded = {}
    for node in graph:
        transposes = node.op_type == "Gemm" and bool(node.attributes.get_int("transB"))
        if not (node.op_type == "Conv" or transposes) or producer(node.inputs[0], "DequantizeLinear") is not None:
            continue
        dequantise = producer(node.inputs[1], "DequantizeLinear")
        weight = None if dequantise is None or dequantise.inputs[0] is None else dequantise.inputs[0].const_value
        if weight is not None:
            expanded[node.outputs[0].name or ""] = _FLOAT32_BYTES * weight.size
    return expanded


def as_onnxruntime_holds(graph: SizedGraph, expanded: Mapping[str, int]) -> SizedGraph:
    """The graph with what the provider does otherwise.

    1. Sigmoid and the product with its operand are one kernel (QuickGelu), which writes the product alone.
    2. A sum of two images, one of them the result of a convolution that nothing else reads, is one kernel with that,
       and written over the other image. Of other element-wise operators, few write over their operand.
    3. A Sum, of three terms as `LowerBiasSums` writes it, has a temporary beside.
    4. Weights of `expanded` are written right before the product that reads them.

    Args:
        graph: in the order in which it runs.
        expanded: from `expanded_weights`.

    Source: ONNX Runtime 1.31, high-water marks of small graphs.
    """
    return _Rewriting(graph, expanded).run()


@dataclass
class _Rewriting:
    """The state of one run over one graph.

    Attributes:
        steps: as they are so far.
        added: sizes of new buffers.
        single: buffers that one step reads, and that are no output.
    """

    graph: SizedGraph
    expanded: Mapping[str, int]
    steps: list[Step] = field(default_factory=list)
    added: dict[str, int] = field(default_factory=dict)
    single: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        readers = Counter(buffer for step in self.graph.steps for buffer in set(step.reads))
        self.single = frozenset(buffer for buffer, count in readers.items() if count == 1) - self.graph.outputs

    def run(self) -> SizedGraph:
        for step in self.graph.steps:
            self._add(step)
        names, sizes = (*self.graph.names, *self.added), (*self.graph.bytes, *self.added.values())
        return replace(self.graph, names=names, bytes=sizes, steps=tuple(self.steps))

    def _add(self, step: Step) -> None:
        written = self.graph.names[step.writes[0]] if len(step.writes) == 1 else ""
        if step.operator == "Mul" and (gate := self._take("Sigmoid", step, of_same=True)) is not None:
            step = replace(step, operator="QuickGelu", reads=gate.reads, overwrites=())
        elif self._adds_images(step) and (convolution := self._take("Conv", step)) is not None:
            others = tuple(each for each in step.reads if each not in convolution.writes)
            step = replace(convolution, reads=(*convolution.reads, *others), writes=step.writes, overwrites=others)
        elif step.operator == "Sum":
            step = replace(
                step, writes=(*step.writes, self._buffer(f"{written}.sum", self.graph.bytes[step.writes[0]]))
            )
        if written in self.expanded and step.operator in ("Conv", "Gemm"):
            weight = self._buffer(f"{written}.weight", self.expanded[written])
            self.steps.append(Step("DequantizeLinear", (), (weight,)))
            step = replace(step, reads=(*step.reads, weight))
        keeps = step.overwrites if step.operator in (*_IN_PLACE, "Conv") else ()
        self.steps.append(replace(step, overwrites=keeps))

    def _adds_images(self, step: Step) -> bool:
        """Whether it is the sum of two buffers as large as its result."""
        size = self.graph.bytes
        return step.operator == "Add" and [size[each] for each in step.reads] == 2 * [size[step.writes[0]]]

    def _take(self, operator: str, reader: Step, *, of_same: bool = False) -> Step | None:
        """The last step of an operator whose result nothing but `reader` reads, which is taken out.

        If it is `of_same`, both have to read the same beside.
        """
        for number in reversed(range(len(self.steps))):
            step = self.steps[number]
            is_read = len(step.writes) == 1 and step.writes[0] in reader.reads and step.writes[0] in self.single
            others = {*reader.reads} - {*step.writes}
            if step.operator != operator or not is_read or (of_same and others != {*step.reads}):
                continue
            if not (operator == "Conv" and step.overwrites):
                return self.steps.pop(number)
        return None

    def _buffer(self, name: str, size: int) -> int:
        self.added[name] = size
        return len(self.graph.names) + len(self.added) - 1
