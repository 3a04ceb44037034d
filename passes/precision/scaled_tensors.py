"""Weights with channels multiplied by factors, computed when they are read."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from sdc.passes.mapped_tensors import release
from sdc.passes.matching import add_initializer

_LAZY_FROM_ELEMENTS = 4096
"""Smaller tensors are computed at once."""


def scaled_initializer(graph: ir.Graph, value: ir.Value, factors: np.ndarray, axis: int) -> ir.Value:
    """A new initialiser with the channels of `value` along `axis` multiplied; no second copy of a large one is held."""
    source = value.const_value
    assert source is not None  # callers have asked
    shape = source.shape.numpy()
    twin = add_initializer(graph, np.zeros((), source.dtype.numpy()), f"{value.name}.smoothed")
    scale = partial(_scale, source, factors, axis, twin.name or "")
    if source.size < _LAZY_FROM_ELEMENTS:
        twin.const_value = scale()
    else:
        twin.const_value = ir.LazyTensor(scale, dtype=source.dtype, shape=ir.Shape(shape), name=twin.name)
    twin.shape = ir.Shape(shape)
    return twin


def _scale(source: ir.TensorProtocol, factors: np.ndarray, axis: int, name: str) -> ir.TensorProtocol:
    values = source.numpy()
    along = [1] * values.ndim
    along[axis] = -1
    scaled = (values.astype(np.float64) * factors.reshape(along)).astype(values.dtype)
    del values
    release(source)
    return ir.tensor(scaled, name=name)
