"""upsample-by-phases: a convolution behind an upsampling by two is computed before it, at the low resolution.

Of an image that was repeated in blocks of 2 x 2, a kernel of 3 x 3 sees 2 x 2 different pixels; which of its taps fall
on the same one depends on the parities of row and column alone. Along one axis, with the small image x, pixel 2i + a of
the result, and zero outside:

    y[2i + a] = sum_t w[t] · x[floor((2i + a + t - 1) / 2)] = sum_k v_a[k] · x[i + k + a - 1]
    v_0 = (w[0], w[1] + w[2])        v_1 = (w[0] + w[1], w[2])

So each of the four *phases* is a convolution with 2 x 2 taps: 4/9 of the multiply-adds, and there is no large image
before it.

Source: Vaidyanathan, "Multirate Systems and Filter Banks", Prentice Hall 1993, section 4.3 (polyphase interpolators);
kernels as sums of taps: Colbert, Kreutz-Delgado and Das, arXiv:2107.07647; phases interleaved by a shuffle of channels:
Shi et al., arXiv:1609.05158, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.mapped_tensors import release
from sdc.passes.matching import (
    add_initializer,
    constant,
    dimensions,
    is_operator,
    replace_by_several,
    site,
    unused_name,
)
from sdc.passes.precision.correct_bias import CALIBRATED_AS, EXACT_WEIGHT
from sdc.passes.precision.upsampling_sites import Kernel, Upsampler, match_upsampler
from sdc.passes.precision.weight_qdq import quantise_weights

_PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Parities of row and column, in the order in which DepthToSpace takes its channels (mode DCR)."""


@dataclass(frozen=True)
class UpsampleByPhases(Pass):
    """A 3 x 3 Conv of a doubled image is four 2 x 2 Convs of the image, interleaved.

    Before → after, with kernels w_ab summed from the taps of w, padded at the sides to which phase ab looks::

        y = Conv(Resize(x), w, b)
            →  y = DepthToSpace(Concat(Conv(x, w_00, b), Conv(x, w_01, b), Conv(x, w_10, b), Conv(x, w_11, b)))

    Preconditions:

    1. Resize repeats pixels: nearest neighbours, twice as many rows and columns, by constant scales or by sizes that
       are known to be the double.
    2. The Conv alone reads its result, or one Q/DQ pair that the Conv alone reads. The pair then stands before the
       four Convs: repeating pixels commutes with rounding them.
    3. The Conv has a constant kernel of 3 x 3, one group, strides and dilations of 1, one pixel of padding all around.
    4. A quantised weight is "int8" or "w8" and was quantised in this process: kernels are summed from the exact weight
       and quantised as it was, so that nothing is rounded twice.
    5. Neither node is named in `kept`.

    Not matched: weights in 4 bits or eight-bit floats; what fails these.

    Kernels in floating point are summed when they are written, so that the weight is not held twice. They take 16/9 of
    its bytes. Stands behind `InsertQdq`, since calibrations and plans know the graph as it was before, and in front of
    `CorrectBias`, which has to see the integers that are computed with.

    Attributes:
        kept: first outputs of nodes that are given a floating-point type by name behind this pass.
    """

    name: ClassVar[str] = "upsample-by-phases"

    kept: frozenset[str] = frozenset()

    def rewrite(self, model: ir.Model) -> PassReport:
        """Rewrite all sites."""
        matched = 0
        skipped: list[Skipped] = []
        for resize in [node for node in model.graph if is_operator(node, "Resize")]:
            found = match_upsampler(resize)
            if isinstance(found, Upsampler) and self.kept & {found.resize.outputs[0].name, found.conv.outputs[0].name}:
                found = "it, or the Conv behind it, has a floating-point type of its own"
            if isinstance(found, str):
                skipped.append(Skipped(site(resize), found))
                continue
            _rewrite(model.graph, found)
            matched += 1
        return PassReport(self.name, matched, tuple(skipped))


def phase_kernel(weight: np.ndarray, row: int, column: int) -> np.ndarray:
    """The kernel of one phase, [O, I, 2, 2], in the type of `weight`; sums are in float64.

    Args:
        weight: [O, I, 3, 3].
        row: parity of the rows that the phase writes, 0 or 1; likewise `column`.
    """
    kernel = np.zeros((*weight.shape[:2], 2, 2), np.float64)
    for t in range(3):
        for s in range(3):
            kernel[:, :, _tap(t, row), _tap(s, column)] += weight[:, :, t, s]
    return kernel.astype(weight.dtype)


def _tap(tap: int, parity: int) -> int:
    """Which of a phase's two taps one of the three falls on."""
    return (parity + tap - 1) // 2 + 1 - parity


def _rewrite(graph: ir.Graph, found: Upsampler) -> None:
    conv, kernel = found.conv, found.kernel
    image, y = found.resize.inputs[0], conv.outputs[0]
    assert image is not None  # a required operand
    if found.pair:
        found.pair[0].replace_input_with(0, image)
        for node in found.pair:
            node.outputs[0].shape = image.shape
        image = found.pair[-1].outputs[0]
    new: list[ir.Node] = []
    for row, column in _PHASES:
        new += _phase(graph, found, image, row, column)
    phases = [node.outputs[0] for node in new if node.op_type == "Conv"]
    shape = _shape_like(image, len(_PHASES) * _channels(kernel))
    joined = _node("Concat", phases, {"axis": 1}, like=y, label="phases", shape=shape)
    joined.name = f"{conv.name}.phases"
    interleaving: Mapping[str, int | str] = {"blocksize": 2, "mode": "DCR"}
    interleaved = _node("DepthToSpace", joined.outputs, interleaving, like=y, label="interleaved", shape=y.shape)
    old = [conv, found.resize, *([] if kernel.dequantise is None else [kernel.dequantise])]
    replace_by_several(old, [*new, joined, interleaved], [y], interleaved.outputs, at=conv)
    if not kernel.stored.uses() and not kernel.stored.is_graph_output():
        del graph.initializers[kernel.stored.name or ""]


def _phase(graph: ir.Graph, found: Upsampler, image: ir.Value, row: int, column: int) -> list[ir.Node]:
    """The nodes that compute a phase, not yet in the graph; its Conv is the last."""
    conv, label = found.conv, f"phase{row}{column}"
    kernel = _lazy_kernel(found.kernel.exact, row, column, unused_name(graph, f"{found.kernel.stored.name}.{label}"))
    nodes: list[ir.Node] = []
    if found.kernel.dequantise is None:
        weight = ir.Value(name=kernel.name, shape=kernel.shape, type=ir.TensorType(kernel.dtype), const_value=kernel)
        graph.register_initializer(weight)
    else:
        nodes.append(_quantised(graph, found.kernel, kernel, label))
        weight = nodes[0].outputs[0]
    attributes = {"kernel_shape": [2, 2], "pads": [1 - row, 1 - column, row, column]}
    shape = _shape_like(image, _channels(found.kernel))
    part = _node("Conv", [image, weight, *conv.inputs[2:]], attributes, like=conv.outputs[0], label=label, shape=shape)
    part.name = f"{conv.name}.{label}"
    if nodes:
        part.meta[EXACT_WEIGHT] = kernel
        part.meta[CALIBRATED_AS] = found.resize.outputs[0].name
    return [*nodes, part]


def _lazy_kernel(weight: ir.TensorProtocol, row: int, column: int, name: str) -> ir.LazyTensor:
    """`phase_kernel`, summed whenever it is read."""

    def summed() -> ir.TensorProtocol:
        kernel = ir.tensor(phase_kernel(weight.numpy(), row, column), dtype=weight.dtype, name=name)
        release(weight)
        return kernel

    shape = ir.Shape([*weight.shape.numpy()[:2], 2, 2])
    return ir.LazyTensor(summed, dtype=weight.dtype, shape=shape, name=name)


def _quantised(graph: ir.Graph, old: Kernel, kernel: ir.LazyTensor, label: str) -> ir.Node:
    """A DequantizeLinear of integers as those of the whole kernel: as many levels, one scale or one per channel."""
    integers = constant(old.stored)
    assert old.dequantise is not None  # quantised sites are asked for
    assert old.scale is not None
    assert integers is not None
    # A symmetric scale puts the largest weight on the last level, however many bits there are.
    levels = int(np.abs(integers.astype(np.int32)).max()) or 1
    axis = 0 if old.scale.size > 1 else None
    codes, steps = quantise_weights(kernel.numpy().astype(np.float32), levels=levels, axis=axis)
    stored = add_initializer(graph, codes, kernel.name or "")
    whole_scale = old.dequantise.inputs[1]
    assert whole_scale is not None  # `old.scale` is its tensor
    scale = add_initializer(graph, steps.astype(old.scale.dtype.numpy()), f"{whole_scale.name}.{label}")
    node = ir.node("DequantizeLinear", [stored, scale], {} if axis is None else {"axis": axis})
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{stored.name}.dequantised", kernel.shape, old.dequantise.outputs[0].type
    return node


def _channels(kernel: Kernel) -> int:
    return int(kernel.exact.shape.numpy()[0])


def _shape_like(image: ir.Value, channels: int) -> ir.Shape | None:
    """Of an image as large with so many channels."""
    known = dimensions(image)
    return None if known is None else ir.Shape([known[0], channels, *known[2:]])


def _node(
    op_type: str,
    operands: Sequence[ir.Value | None],
    attributes: Mapping[str, int | str | list[int]],
    *,
    like: ir.Value,
    label: str,
    shape: ir.Shape | None,
) -> ir.Node:
    """A node whose result is named after `like` and has its element type."""
    node = ir.node(op_type, operands, attributes)
    output = node.outputs[0]
    output.name, output.type, output.shape = f"{like.name}.{label}", like.type, shape
    return node
