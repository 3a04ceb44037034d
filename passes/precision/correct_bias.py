"""correct-bias: what rounding a weight does to a layer's mean output is taken off its bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.mapped_tensors import release
from sdc.passes.matching import add_initializer, constant_tensor, is_operator, producer, site, sole_consumer
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.quantisation import Kind

EXACT_WEIGHT = "sdc.exact_weight"
"""Key of a layer's `meta`: the tensor that its weight was before it was quantised."""

CALIBRATED_AS = "sdc.calibrated_as"
"""Likewise: the name of a tensor of the calibrated graph that has the means of what the layer reads."""

_MARK = "sdc.bias_corrected"

_BIAS_READERS = (domain.BIAS_GEGLU, domain.BIAS_ADD_LAYER_NORM, domain.BIAS_ADD)
"""Fused operators that add a bias, their second input, to what a MatMul gives."""


@dataclass(frozen=True)
class CorrectBias(Pass):
    """The mean output of each channel is what it was with the exact weight.

    Before → after, for a layer whose weight W became W' behind DequantizeLinear::

        y = W' x + b  →  y = W' x + (b + (W - W') E[x])

    E[x] is the mean of each input channel over the calibration; at a convolution's border, where padding stands for
    part of it, the correction is that of the inside.

    1. `InsertQdq` has quantised the layer in this process (the exact weight is not in the graph any more).
    2. The layer is a Conv; a Gemm with alpha and beta of 1; or a MatMul before a constant bias: Add, BiasGeGlu,
       BiasAddLayerNorm or BiasAdd, and nothing else reads it.
    3. The table has means for the layer's activation.

    Left alone: MatMuls without a bias (query, key and value), for which the correction would be one more operator.

    Source: Nagel et al., arXiv:1906.04721, section 4.2, equation 17.

    Attributes:
        table: the means.
    """

    name: ClassVar[str] = "correct-bias"

    table: CalibrationTable

    def rewrite(self, model: ir.Model) -> PassReport:
        """Correct every layer once.

        Raises:
            PassError: the means of an activation are missing.
        """
        matched = 0
        skipped: list[Skipped] = []
        for node in list(model.graph):
            exact = node.meta.get(EXACT_WEIGHT)
            if exact is None or _MARK in node.meta:
                continue
            place = _bias_place(node)
            if isinstance(place, str):
                skipped.append(Skipped(site(node), place))
                continue
            means = np.asarray(self.table.statistics_of(_activation_name(node)).channel_means)
            _add_to_bias(model.graph, *place, _mean_error(node, exact, means))
            node.meta[_MARK] = True
            matched += 1
        return PassReport(self.name, matched, tuple(skipped))


def _bias_place(node: ir.Node) -> tuple[ir.Node, int] | str:
    """The node and the number of its input that hold the layer's bias; the input may be missing."""
    if is_operator(node, Kind.GEMM) and any(
        node.attributes.get_float(factor, 1.0) != 1.0 for factor in ("alpha", "beta")
    ):
        return "a Gemm that scales its product or its bias"
    if not is_operator(node, Kind.MATMUL):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return (node, 2) if bias is None or constant_tensor(bias) is not None else "a bias that is not constant"
    reader = sole_consumer(node.outputs[0])
    if reader is None:
        return "a MatMul that several nodes read"
    if any(domain.is_fused(reader, name) for name in _BIAS_READERS) and reader.inputs[0] is node.outputs[0]:
        return reader, 1
    if is_operator(reader, "Add"):
        for index, value in enumerate(reader.inputs):
            tensor = constant_tensor(value)
            if tensor is not None and len(tensor.shape) == 1:
                return reader, index
    return "a MatMul without a bias: correcting it would take one more operator"


def _activation_name(node: ir.Node) -> str:
    if CALIBRATED_AS in node.meta:
        return str(node.meta[CALIBRATED_AS])
    value = node.inputs[0]
    dequantise = producer(value, "DequantizeLinear")
    integers = None if dequantise is None else dequantise.inputs[0]
    quantise = producer(integers, "QuantizeLinear") or producer(integers, "DynamicQuantizeLinear")
    source = value if quantise is None else quantise.inputs[0]
    return "" if source is None else source.name or ""


def _dequantise_of(node: ir.Node) -> ir.Node:
    """What a layer's weight comes from."""
    weight = node.inputs[1]
    kernel = producer(weight, "Reshape")  # of a Conv whose weight is stored in blocks, as a matrix
    dequantise = producer(weight if kernel is None else kernel.inputs[0], "DequantizeLinear")
    assert dequantise is not None  # `InsertQdq` has put it there
    return dequantise


def _mean_error(node: ir.Node, exact: ir.TensorProtocol, means: np.ndarray) -> np.ndarray:
    """(W - W') E[x]: [outputs], float64."""
    wanted = exact.numpy().astype(np.float64)
    error = wanted - dequantised_constant(_dequantise_of(node)).reshape(wanted.shape)
    release(exact)
    if is_operator(node, Kind.CONV):
        return np.asarray(error.reshape(*error.shape[:2], -1).sum(axis=2) @ means)
    transposed = is_operator(node, Kind.GEMM) and bool(node.attributes.get_int("transB", 0))
    return np.asarray(error @ means if transposed else means @ error)


def dequantised_constant(node: ir.Node) -> np.ndarray:
    """What a DequantizeLinear of a constant gives, float64: one scale, one for each index of an axis, or blocks.

    Source: ONNX operator specification, DequantizeLinear 23.
    """
    stored, scale, *rest = (constant_tensor(value) for value in node.inputs)
    assert stored is not None  # quantised weights are constants
    assert scale is not None
    integers = stored.numpy().astype(np.float64)
    offset = rest[0].numpy().astype(np.float64) if rest and rest[0] is not None else np.zeros(())
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)

    def spread(array: np.ndarray) -> np.ndarray:
        if array.size == 1:
            return array.reshape(())
        if block:
            return np.repeat(array, block, axis=axis).take(np.arange(integers.shape[axis]), axis=axis)
        return array.reshape([-1 if each == axis % integers.ndim else 1 for each in range(integers.ndim)])

    return np.asarray((integers - spread(offset)) * spread(scale.numpy().astype(np.float64)))


def _add_to_bias(graph: ir.Graph, node: ir.Node, index: int, addend: np.ndarray) -> None:
    value = node.inputs[index] if len(node.inputs) > index else None
    tensor = constant_tensor(value)
    if tensor is None:
        scale = constant_tensor(_dequantise_of(node).inputs[1])
        assert scale is not None  # scales of weights are constants
        node.resize_inputs(max(len(node.inputs), index + 1))
        bias, name = addend.astype(scale.dtype.numpy()), f"{node.outputs[0].name}.bias"
    else:
        assert value is not None
        bias, name = (tensor.numpy() + addend).astype(tensor.dtype.numpy()), f"{value.name}.corrected"
    node.replace_input_with(index, add_initializer(graph, bias, name))
