"""Tensors in float16 that are converted when they are written, not before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from sdc.passes.mapped_tensors import release

FLOAT16_MAX = 65504.0
"""Largest finite float16. Source: IEEE 754-2019, binary16."""

_FLOAT16_UNDERFLOW = 2.0**-25
"""Magnitudes up to here become zero. Source: IEEE 754-2019, half of binary16's smallest subnormal 2^-24."""

_LAZY_FROM_ELEMENTS = 4096
"""Smaller tensors are converted at once."""


@dataclass(frozen=True)
class HalfTensor:
    """A float16 tensor and what became of its values.

    Attributes:
        tensor: the same shape in float16; a large one reads and converts its source whenever it is read.
        clamped: number of finite values beyond float16's range, which are now ±65504.
        underflowed: number of values that were not zero and are now; counted in small tensors only.
    """

    tensor: ir.TensorProtocol
    clamped: int
    underflowed: int


def half_from_tensor(tensor: ir.TensorProtocol) -> HalfTensor:
    """Float16 of a float32 tensor; finite values stay finite, infinities stay infinite."""
    values = tensor.numpy()
    small = values.size < _LAZY_FROM_ELEMENTS
    clamped = _count_beyond(values)
    underflowed = int(np.count_nonzero((values != 0) & (np.abs(values) <= _FLOAT16_UNDERFLOW))) if small else 0
    shape = ir.Shape(values.shape)
    del values
    release(tensor)
    convert = partial(_convert, tensor, clamp=clamped > 0)
    if small:
        half: ir.TensorProtocol = convert()
    else:
        half = ir.LazyTensor(convert, dtype=ir.DataType.FLOAT16, shape=shape, name=tensor.name)
    return HalfTensor(half, clamped, underflowed)


def _count_beyond(values: np.ndarray) -> int:
    # min and max make no copy of a weight; the exact count is needed only when there is something to count.
    if values.size == 0 or (values.max() <= FLOAT16_MAX and values.min() >= -FLOAT16_MAX):
        return 0
    return int(np.count_nonzero(np.isfinite(values) & (np.abs(values) > FLOAT16_MAX)))


def _convert(tensor: ir.TensorProtocol, *, clamp: bool) -> ir.TensorProtocol:
    values = tensor.numpy()
    if clamp:
        values = np.where(np.isfinite(values), values.clip(-FLOAT16_MAX, FLOAT16_MAX), values)
    half = ir.tensor(values.astype(np.float16), name=tensor.name)
    del values
    release(tensor)
    return half
