"""Dequantised weights: integers or eight-bit floats in the graph's constants, with their scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sdc.engines.errors import InputError, PassError
from sdc.passes.matching import add_initializer, site
from sdc.passes.precision.formats import Format
from sdc.passes.precision.fp8_qdq import fp8_weights
from sdc.passes.precision.quantisation import Layer, row_length
from sdc.passes.precision.scales import scale_from_range
from sdc.passes.precision.weight_blocks import quantise_blocks


@dataclass(frozen=True)
class _Codes:
    """A weight as it is stored.

    Attributes:
        stored: integers or eight-bit floats.
        scale: float32.
        attributes: of the DequantizeLinear.
    """

    stored: np.ndarray
    scale: np.ndarray
    attributes: dict[str, int]


class StoredWeights:
    """The weights of one graph that have been put behind DequantizeLinear; a shared one is stored once for each use.

    "w4" is stored in blocks along the input channels; the kernel of a Conv as a matrix [O, I * kernel], behind a
    Reshape, since TensorRT takes blocks of matrices only.

    Args:
        graph: what is rewritten.
        bits: of "int8" and "w8", 2 to 8; below 8 the integers are limited to the smaller range, in int8 storage.
        per_channel: whether these have one scale per output channel, or one for the whole weight.
        block_size: weights of a row that share a scale in "w4".
    """

    def __init__(self, graph: ir.Graph, *, bits: int, per_channel: bool, block_size: int) -> None:
        self._graph = graph
        self._bits = bits
        self._per_channel = per_channel
        self._block_size = block_size
        self._dequantised: dict[tuple[ir.Value, int, Format], ir.Value] = {}
        self._bytes_before = 0
        self._bytes_after = 0

    def dequantised(self, layer: Layer, wanted: Format) -> ir.Value:
        """The layer's weight behind DequantizeLinear, in the type that the layer computes in.

        Raises:
            PassError: it holds NaN or infinity.
            InputError: its rows do not divide into blocks.
        """
        stored_as = Format.W8 if wanted is Format.INT8 else wanted
        key = (layer.weight, layer.output_axis, stored_as)
        if key not in self._dequantised:
            self._dequantised[key] = self._store(layer, stored_as)
        return self._dequantised[key]

    def remove_unused(self) -> None:
        """Drop the floating-point weights that nothing reads any more."""
        for weight in {weight for weight, _, _ in self._dequantised}:
            name = weight.name or ""
            if not weight.uses() and name in self._graph.initializers and not weight.is_graph_output():
                del self._graph.initializers[name]

    def details(self) -> dict[str, Any]:
        """Figures for the report."""
        return {
            "weights": len(self._dequantised),
            "weight_bytes_before": self._bytes_before,
            "weight_bytes_after": self._bytes_after,
            "weight_bits": self._bits,
            "per_channel": self._per_channel,
        }

    def _store(self, layer: Layer, stored_as: Format) -> ir.Value:
        tensor = ir.convenience.get_const_tensor(layer.weight)
        assert tensor is not None  # `find_layers` selects constant weights only
        weights = tensor.numpy().astype(np.float32)
        if not np.isfinite(weights).all():
            raise PassError(f"the weight of {site(layer.node)} holds NaN or infinity", hint="check the checkpoint")
        codes = self._encode(layer, weights, stored_as)
        suffix = "int8" if stored_as is Format.W8 else stored_as.value
        stored = add_initializer(self._graph, codes.stored, f"{layer.weight.name}.{suffix}")
        scale = codes.scale.astype(tensor.dtype.numpy())
        scales = add_initializer(self._graph, scale, f"{layer.weight.name}.qdq_scale")
        node = ir.node("DequantizeLinear", [stored, scales], codes.attributes)
        _describe(node, f"{stored.name}.dequantised", codes.stored.shape, tensor.dtype)
        self._graph.insert_before(layer.node, node)
        self._bytes_before += tensor.nbytes
        assert stored.const_value is not None
        self._bytes_after += stored.const_value.nbytes + scale.nbytes
        return self._shaped(node.outputs[0], weights.shape, layer)

    def _encode(self, layer: Layer, weights: np.ndarray, stored_as: Format) -> _Codes:
        axis = layer.output_axis
        if stored_as is Format.W4:
            return self._encode_blocks(layer, weights)
        if stored_as is Format.FP8:
            values, scale = fp8_weights(weights, axis)
            return _Codes(values, scale, {"axis": axis})
        levels = 2 ** (self._bits - 1) - 1
        integers, scale = quantise_weights(weights, levels=levels, axis=axis if self._per_channel else None)
        return _Codes(integers, scale, {"axis": axis} if self._per_channel else {})

    def _encode_blocks(self, layer: Layer, weights: np.ndarray) -> _Codes:
        size, length = self._block_size, row_length(layer)
        if length % size:
            raise InputError(
                f"{site(layer.node)} has {length} weights to a row, which do not divide into blocks of {size}",
                hint="choose w8 for it",
            )
        by_columns = layer.output_axis == 1
        rows = weights.T if by_columns else weights.reshape(len(weights), -1)
        integers, scale = quantise_blocks(rows, size)
        if by_columns:
            integers, scale = np.ascontiguousarray(integers.T), np.ascontiguousarray(scale.T)
        return _Codes(integers.astype(ml_dtypes.int4), scale, {"axis": 0 if by_columns else 1, "block_size": size})

    def _shaped(self, value: ir.Value, shape: tuple[int, ...], layer: Layer) -> ir.Value:
        """`value` in the weight's own shape."""
        if value.shape == ir.Shape(shape):
            return value
        size = add_initializer(self._graph, np.array(shape, np.int64), f"{layer.weight.name}.shape")
        node = ir.node("Reshape", [value, size])
        assert value.dtype is not None  # written by `_describe`
        _describe(node, f"{value.name}.kernel", shape, value.dtype)
        self._graph.insert_before(layer.node, node)
        return node.outputs[0]


def _describe(node: ir.Node, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> None:
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = name, ir.Shape(shape), dtype


def quantise_weights(weights: np.ndarray, *, levels: int, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric integers of a weight.

    Args:
        weights: any shape, finite.
        levels: the largest integer.
        axis: one scale for each index along it; a single scale if None.

    Returns:
        The integers (int8, the weight's shape, within ±levels) and the scales (float32, [weights.shape[axis]] or []).
    """
    others = None if axis is None else tuple(i for i in range(weights.ndim) if i != axis)
    limits = np.abs(weights).max(axis=others)
    scale = scale_from_range(limits, levels)
    spread = scale if axis is None else np.expand_dims(scale, others or ())
    return np.rint(weights / spread).astype(np.int8), scale
