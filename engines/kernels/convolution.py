"""The convolution among the CPU kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from sdc.engines.errors import InputError
from sdc.engines.kernels.rows import Images, Rows

_TYPES = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.int8): 2, np.dtype(np.float16): 3}
"""`SdcWeightType` of convolution.h."""

_ALIGNMENT = 64
MOST_INTEGER_PRODUCTS = (2**31 - 1) // (255 * 128)
"""Of a uint8 and an int8, as many as an int32 holds the sum of."""


class _Filter(ctypes.Structure):
    """`SdcFilter` of convolution.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("gates", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("output_stride", ctypes.c_int64),
        ("channel_stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


class _Convolution(ctypes.Structure):
    """`SdcConvolution` of convolution.h."""

    _fields_ = (
        ("input", Images),
        ("output", Images),
        ("filter", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("shifts", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("top", ctypes.c_int64),
        ("left", ctypes.c_int64),
        ("gated", ctypes.c_int32),
        ("bytes", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_float),
    )


@dataclass(frozen=True)
class Quantisation:
    """How a value is made an integer from 0 to 255: round(value / scale) + zero_point, and no less or more."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Filter:
    """Weights as the kernel reads them.

    Attributes:
        packed: uint8.
        sums: int32, [outputs], of the integers of each output, and behind them those of the gates; None for weights in
            bf16.
        shape: [outputs, channels, window, window].
        gated: whether there are gates.
    """

    packed: np.ndarray
    sums: np.ndarray | None
    shape: tuple[int, ...]
    gated: bool = False


class Convolver:
    """The functions of a library of kernels that convolve.

    Args:
        library: on a processor with AMX.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._packed_bytes = library.sdc_packed_filter_bytes
        self._packed_bytes.argtypes = (ctypes.POINTER(_Filter),)
        self._packed_bytes.restype = ctypes.c_int64
        self._pack = library.sdc_pack_filter
        self._pack.argtypes = (ctypes.POINTER(_Filter),)
        self._pack.restype = ctypes.c_char_p
        self._convolve = library.sdc_convolution
        self._convolve.argtypes = (ctypes.POINTER(_Convolution),)
        self._convolve.restype = ctypes.c_char_p

    def pack(self, weights: np.ndarray, gates: np.ndarray | None = None) -> Filter:
        """Weights in the layout of the kernel.

        Args:
            weights: [outputs, channels, window, window], windows without gaps: float32 or float16, which are
                rounded to bf16; uint16, the bits of bf16; or int8. A matrix [outputs, channels] has a window of 1.
            gates: as many in the same layout, for a gated convolution.

        Raises:
            InputError: another shape, type or layout.
        """
        shape = weights.shape if weights.ndim == 4 else (*weights.shape, 1, 1)
        if len(shape) != 4 or weights.dtype not in _TYPES:
            raise InputError(
                f"weights must be floats or int8 in four dimensions, found {weights.dtype}, {weights.shape}"
            )
        outputs, channels, window, width = shape
        if window != width:
            raise InputError(f"windows must be as high as they are wide, found {weights.shape}")
        strides = tuple(stride // weights.itemsize for stride in weights.strides)
        if window > 1 and strides[2:] != (window, 1):
            raise InputError(f"windows must lie without gaps, found strides of {strides} elements")
        if gates is not None and (gates.shape, gates.dtype, gates.strides) != (
            weights.shape,
            weights.dtype,
            weights.strides,
        ):
            raise InputError(f"gates must be like the weights, {weights.shape}, found {gates.shape}")
        rows = outputs * (1 if gates is None else 2)
        sums = np.empty(rows, np.int32) if weights.dtype == np.int8 else None
        call = _Filter(
            weights.ctypes.data,
            None if gates is None else gates.ctypes.data,
            None,
            None if sums is None else sums.ctypes.data,
            outputs,
            channels,
            window,
            strides[0],
            strides[1],
            _TYPES[weights.dtype],
        )
        packed = _aligned(self._packed_bytes(ctypes.byref(call)))
        call.packed = packed.ctypes.data
        fault: bytes | None = self._pack(ctypes.byref(call))
        if fault is not None:
            raise InputError(f"weights cannot be packed: {fault.decode()}")
        return Filter(packed, sums, shape, gates is not None)

    def convolve(
        self,
        input: Rows,
        output: Rows,
        filter: Filter,
        *,
        size: tuple[int, int],
        factors: np.ndarray,
        offsets: np.ndarray,
        margins: tuple[int, int] | None = None,
        quantisation: Quantisation | None = None,
    ) -> None:
        """output = convolved(input) · factors + offsets, on the threads of the caller's TBB arena.

        With a gated filter, that is multiplied with gelu of the same of the gates.

        Images have margins of zeros, so that the output is as large as the input. Products of bf16 are summed in
        float32, those of bytes in int32; results are rounded to bf16. A NaN that is quantised becomes 255.

        Args:
            input: [B, pixels, channels].
            output: [B, pixels, outputs]; must not overlap the input.
            filter: packed.
            size: height and width of the images.
            factors: float32, [outputs], without gaps, and behind them those of the gates; likewise `offsets`.
            margins: rows above an image, and columns left of it; half a window if None.
            quantisation: how the input is quantised, where the filter's weights are int8: sums are those of its
                integers without the zero point, so that factors include its scale. None otherwise.

        Raises:
            InputError: sizes or types that do not fit each other.
        """
        outputs, channels, window, _ = filter.shape
        height, width = size
        batch = input.shape[0]
        shapes = (tuple(input.shape), tuple(output.shape))
        if shapes != ((batch, height * width, channels), (batch, height * width, outputs)):
            raise InputError(f"images {shapes} of {height} x {width} do not fit weights {tuple(filter.shape)}")
        rows = outputs * (2 if filter.gated else 1)
        if any(each.shape != (rows,) or each.dtype != np.float32 for each in (factors, offsets)):
            raise InputError(f"factors and offsets must be float32, [{rows}]: {factors.shape}, {offsets.shape}")
        if (quantisation is None) != (filter.sums is None):
            raise InputError("weights in int8 go with a quantised input, and no others do")
        shifts = None
        if quantisation is not None and filter.sums is not None:
            shifts = filter.sums * np.int32(quantisation.zero_point)
        call = _Convolution(
            input.as_images(),
            output.as_images(),
            filter.packed.ctypes.data,
            factors.ctypes.data,
            offsets.ctypes.data,
            None if shifts is None else shifts.ctypes.data,
            batch,
            height,
            width,
            channels,
            outputs,
            window,
            *(margins or (window // 2, window // 2)),
            filter.gated,
            quantisation is not None,
            1.0 if quantisation is None else quantisation.scale,
            0.0 if quantisation is None else quantisation.zero_point,
        )
        fault: bytes | None = self._convolve(ctypes.byref(call))
        if fault is not None:
            raise InputError(f"images cannot be convolved: {fault.decode()}")


def _aligned(size: int) -> np.ndarray:
    """So many bytes, from a multiple of `_ALIGNMENT` on."""
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size]
