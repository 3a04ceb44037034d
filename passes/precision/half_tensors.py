"""Tensors in 16-bit floating-point types that are converted when they are written, not before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from sdc.passes.mapped_tensors import release

FLOAT16_MAX = 65504.0
"""Largest finite float16. Source: IEEE 754-2019, binary16."""

_LARGEST = {ir.DataType.FLOAT16: FLOAT16_MAX, ir.DataType.BFLOAT16: (2 - 2.0**-7) * 2.0**127}
"""Source: bfloat16 has binary32's exponents and 7 bits of fraction."""

_UNDERFLOW = {ir.DataType.FLOAT16: 2.0**-25, ir.DataType.BFLOAT16: 2.0**-134}
"""Magnitudes up to here become zero: half of the smallest subnormal. Source: IEEE 754-2019, binary16; 2^-126-7 for
bfloat16."""

EXACT_CONSTANT = "sdc.exact_constant"
"""Key of a 16-bit constant's `meta`: the float32 tensor that it is rounded from."""

_LAZY_FROM_ELEMENTS = 4096
"""Smaller tensors are converted at once."""


@dataclass(frozen=True)
class HalfTensor:
    """A 16-bit tensor and what became of its values.

    Attributes:
        tensor: the same shape in 16 bits; a large one reads and converts its source whenever it is read.
        clamped: number of finite values beyond the type's range, which are now its largest.
        underflowed: number of values that were not zero and are now; counted in small tensors only.
    """

    tensor: ir.TensorProtocol
    clamped: int
    underflowed: int


def half_from_tensor(tensor: ir.TensorProtocol, dtype: ir.DataType = ir.DataType.FLOAT16) -> HalfTensor:
    """A float32 tensor in `dtype`; finite values stay finite, infinities stay infinite."""
    values = tensor.numpy()
    small = values.size < _LAZY_FROM_ELEMENTS
    clamped = _count_beyond(values, _LARGEST[dtype])
    underflowed = int(np.count_nonzero((values != 0) & (np.abs(values) <= _UNDERFLOW[dtype]))) if small else 0
    shape = ir.Shape(values.shape)
    del values
    release(tensor)
    convert = partial(_convert, tensor, dtype, clamp=clamped > 0)
    if small:
        half: ir.TensorProtocol = convert()
    else:
        half = ir.LazyTensor(convert, dtype=dtype, shape=shape, name=tensor.name)
    return HalfTensor(half, clamped, underflowed)


def _count_beyond(values: np.ndarray, largest: float) -> int:
    # min and max make no copy of a weight; the exact count is needed only when there is something to count.
    if values.size == 0 or (values.max() <= largest and values.min() >= -largest):
        return 0
    return int(np.count_nonzero(np.isfinite(values) & (np.abs(values) > largest)))


def _convert(tensor: ir.TensorProtocol, dtype: ir.DataType, *, clamp: bool) -> ir.TensorProtocol:
    values = tensor.numpy()
    if clamp:
        values = np.where(np.isfinite(values), values.clip(-_LARGEST[dtype], _LARGEST[dtype]), values)
    half = ir.tensor(values.astype(dtype.numpy()), name=tensor.name)
    del values
    release(tensor)
    return half
