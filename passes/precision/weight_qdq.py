"""Dequantised weights: integers or eight-bit floats in the graph's constants, with their scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes.matching import add_initializer, site
from sdc.passes.precision.quantisation import Layer
from sdc.passes.precision.scales import scale_from_range


class StoredWeights:
    """The weights of one graph that have been put behind DequantizeLinear; a shared one is stored once for each axis.

    Args:
        graph: what is rewritten.
        bits: 2 to 8; below 8 the integers are limited to the smaller range, in int8 storage.
        per_channel: one scale per output channel, or one for the whole weight.
    """

    def __init__(self, graph: ir.Graph, *, bits: int, per_channel: bool) -> None:
        self._graph = graph
        self._bits = bits
        self._per_channel = per_channel
        self._dequantised: dict[tuple[ir.Value, int], ir.Value] = {}
        self._bytes_before = 0
        self._bytes_after = 0

    def dequantised(self, layer: Layer) -> ir.Value:
        """The layer's weight behind DequantizeLinear, in the type that the layer computes in.

        Raises:
            PassError: it holds NaN or infinity.
        """
        key = (layer.weight, layer.output_axis)
        if key not in self._dequantised:
            self._dequantised[key] = self._store(layer)
        return self._dequantised[key]

    def remove_unused(self) -> None:
        """Drop the floating-point weights that nothing reads any more."""
        for weight, _ in self._dequantised:
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

    def _store(self, layer: Layer) -> ir.Value:
        value, axis = layer.weight, layer.output_axis
        tensor = ir.convenience.get_const_tensor(value)
        assert tensor is not None  # `find_layers` selects constant weights only
        weights = tensor.numpy().astype(np.float32)
        if not np.isfinite(weights).all():
            raise PassError(f"the weight of {site(layer.node)} holds NaN or infinity", hint="check the checkpoint")
        levels = 2 ** (self._bits - 1) - 1
        integers, scale = quantise_weights(weights, levels=levels, axis=axis if self._per_channel else None)
        stored = add_initializer(self._graph, integers, f"{value.name}.int8")
        scales = add_initializer(self._graph, scale.astype(tensor.dtype.numpy()), f"{value.name}.qdq_scale")
        node = ir.node("DequantizeLinear", [stored, scales], {"axis": axis} if self._per_channel else {})
        node.outputs[0].name = f"{stored.name}.dequantised"
        node.outputs[0].shape = ir.Shape(weights.shape)
        node.outputs[0].dtype = tensor.dtype
        self._graph.insert_before(layer.node, node)
        self._bytes_before += tensor.nbytes
        self._bytes_after += integers.nbytes + scale.nbytes
        return node.outputs[0]


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
