"""Where tensors lie that the kernels read and write."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass


class Tensor(ctypes.Structure):
    """`SdcTensor` of attention.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )


class Images(ctypes.Structure):
    """`SdcImages` of images.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("pixel_stride", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Rows:
    """Where a bf16 tensor [B, S, width] lies: rows of heads · head_size features, or pixels of channels.

    Attributes:
        address: of its first element.
        shape: [B, S, width].
        strides: in elements, of the first two dimensions; the last one's is 1. None for a tensor without gaps.
    """

    address: int
    shape: Sequence[int]
    strides: tuple[int, int] | None = None

    def as_tensor(self, heads: int) -> Tensor:
        """The C structure of features."""
        return Tensor(self.address, *self._strides(), self.shape[2] // heads)

    def as_images(self) -> Images:
        """The C structure of pixels."""
        return Images(self.address, *self._strides())

    def _strides(self) -> tuple[int, int]:
        return self.strides or (self.shape[1] * self.shape[2], self.shape[2])
