"""smooth-quant: channels of one tensor get magnitudes that one scale fits, and the graph computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes.base import Pass, PassReport
from sdc.passes.mapped_tensors import release
from sdc.passes.precision.calibration_table import Smoothing, check_digest
from sdc.passes.precision.quantisation import Layer, find_layers
from sdc.passes.precision.scaled_tensors import scaled_initializer
from sdc.passes.precision.smoothing_sites import SmoothingSite, find_sites

_MARK = "sdc.smoothed_from"
"""Metadata key: digest of the graph that a smoothed one came from."""


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Move outliers from activations to weights, where there is a scale for each channel.

    Before → after, for a tensor X that constants write (gamma, beta, ...) and layers with weights W read::

        X · W  →  (X diag(s)^-1) · (diag(s) W),    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

    The factors s have a median of 1: as one scale is chosen for the whole tensor, only ratios matter. The same X
    diag(s)^-1 comes out however the channels of X and W were scaled against each other before, so outliers of that
    origin leave no trace, down to the outlier ratio. Channels whose factor is near the median keep 1, see
    `SmoothingRule`. Sites are taken from the last to the first, because the weights that write one are read at another:
    a scaled column must not be seen as a large row.

    1. X is written by the scale and shift of a LayerNormalization or GroupNormalization, alone or fused with a sum; by
       the projection of an attention's values (its rows mix tokens, not channels); by the half of a BiasGeGlu that its
       gate multiplies; or, an image, by a Conv. Between an image's writers and X there may be sums of such images (Add,
       without broadcasting of channels; all summands are scaled alike) and changes of spatial sizes (Resize).
    2. Those are constants, and the projection behind values or gate, or an image before a sum or a change of size, has
       no other reader.
    3. Nothing but layers (Conv, MatMul, Gemm with a constant weight) reads X, and all have its channels on one axis:
       that of the writer.
    4. The table has magnitudes for X.

    Left alone: what stands behind SiLU or another function of one argument that is not homogeneous (f(x / s) is not
    f(x) / s; a ResNet block's GroupNorm → SiLU → Conv), residual streams that a norm reads as well (it mixes channels),
    the prompt's embedding and other inputs, and a gate that is not fused. Constants that other nodes share are copied.

    Attributes:
        smoothing: magnitudes and rule, or factors; another graph is refused.

    Source: Xiao et al., "SmoothQuant", arXiv:2211.10438, equations 3 and 4; pairs beside norm → linear as in Nagel et
    al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721, section 4.1.
    """

    name: ClassVar[str] = "smooth-quant"

    smoothing: Smoothing

    def rewrite(self, model: ir.Model) -> PassReport:
        """Scale every site that has outliers once.

        Raises:
            PassError: the magnitudes are another graph's, or those of a tensor are missing.
        """
        if model.metadata_props.get(_MARK) == self.smoothing.graph_digest:
            return PassReport(self.name, 0)
        check_digest(model, self.smoothing.graph_digest)
        sites, skipped = find_sites(find_layers(model)[0])
        scaled = scale_sites(model, sites, self.smoothing)
        model.metadata_props[_MARK] = self.smoothing.graph_digest
        largest = max((max(factors.max(), 1 / factors.min()) for factors in scaled.values()), default=1.0)
        details = {"rule": self.smoothing.rule.label, "sites": len(sites), "largest_factor": float(f"{largest:.4g}")}
        return PassReport(self.name, len(scaled), tuple(skipped), details=details)


def smooth(model: ir.Model, smoothing: Smoothing) -> Smoothing:
    """Do to `model` what the pass does; returns `smoothing` with the factors that it came to.

    Raises:
        PassError: the magnitudes of a tensor are missing.
    """
    scaled = scale_sites(model, find_sites(find_layers(model)[0])[0], smoothing)
    return replace(smoothing, factors={name: tuple(factors.tolist()) for name, factors in scaled.items()})


def scale_sites(model: ir.Model, sites: Sequence[SmoothingSite], smoothing: Smoothing) -> dict[str, np.ndarray]:
    """Scale every site that has outliers once, from the last to the first; returns the factors by the tensor's name."""
    scaled: dict[str, np.ndarray] = {}
    for each in reversed(sites):
        factors = _factors(each, smoothing)
        if (factors != 1).any():
            scaled[each.tensor.name or ""] = factors
            _scale_site(model.graph, each, factors)
    return scaled


def _factors(found: SmoothingSite, smoothing: Smoothing) -> np.ndarray:
    name = found.tensor.name or ""
    if name not in smoothing.magnitudes:
        raise PassError(f"no magnitudes of tensor {name!r} to smooth it with", hint="calibrate again")
    activations = np.asarray(smoothing.magnitudes[name], np.float64)
    if smoothing.factors is not None:
        return np.asarray(smoothing.factors.get(name, np.ones(len(activations))), np.float64)
    weights = np.max([_input_magnitudes(layer) for layer in found.readers], axis=0)
    return smoothing.rule.factors(activations, weights)


def _input_magnitudes(layer: Layer) -> np.ndarray:
    tensor = layer.weight.const_value
    assert tensor is not None  # `find_layers` selects constant weights only
    values = tensor.numpy()
    others = tuple(axis for axis in range(values.ndim) if axis != layer.input_axis)
    found = np.maximum(values.max(axis=others), -values.min(axis=others)).astype(np.float64)
    del values
    release(tensor)
    return np.asarray(found)


def _scale_site(graph: ir.Graph, found: SmoothingSite, factors: np.ndarray) -> None:
    for writer in found.writers:
        value = writer.node.inputs[writer.index]
        assert value is not None
        assert value.shape is not None
        shares = np.ones(int(value.shape.numpy()[writer.axis]))
        shares[: writer.channels] = 1 / factors
        writer.node.replace_input_with(writer.index, scaled_initializer(graph, value, shares, writer.axis))
    twins: dict[tuple[ir.Value, int], ir.Value] = {}
    for layer in found.readers:
        key = (layer.weight, layer.input_axis)
        if key not in twins:
            twins[key] = scaled_initializer(graph, layer.weight, factors, layer.input_axis)
        layer.node.replace_input_with(1, twins[key])
