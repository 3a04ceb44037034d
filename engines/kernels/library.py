"""The library of CPU kernels, loaded."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdc.engines.environment import kernels_beyond_attention, kernels_may_use_amx, kernels_wanted
from sdc.engines.errors import InputError
from sdc.engines.kernels.build import build_kernels, missing_to_build
from sdc.engines.kernels.convolution import Convolver
from sdc.engines.kernels.rows import Images, Rows, Tensor

log = logging.getLogger(__name__)

_SWITCHED_OFF = "they are switched off by SDC_KERNELS=0"
_finding = threading.Lock()
"""Engines are loaded in several threads; the kernels are built once."""


class _Attention(ctypes.Structure):
    """`SdcAttention` of attention.h."""

    _fields_ = (
        ("query", Tensor),
        ("key", Tensor),
        ("value", Tensor),
        ("output", Tensor),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
        ("eight_bits", ctypes.c_int32),
        ("amx", ctypes.c_int32),
    )


class _Join(ctypes.Structure):
    """`SdcJoin` of images.h."""

    _fields_ = (
        ("left", Images),
        ("right", Images),
        ("output", Images),
        ("batch", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("left_channels", ctypes.c_int64),
        ("right_channels", ctypes.c_int64),
    )


class _Interleave(ctypes.Structure):
    """`SdcInterleave` of images.h."""

    _fields_ = (
        ("phases", Images * 4),
        ("output", Images),
        ("batch", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("channels", ctypes.c_int64),
    )


class _GroupNorm(ctypes.Structure):
    """`SdcGroupNorm` of group_norm.h."""

    _fields_ = (
        ("input", Images),
        ("summand", Images),
        ("sum", Images),
        ("output", Images),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("addend", ctypes.c_void_p),
        ("addend_batch_stride", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("silu", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Affine:
    """What follows a normalisation, for each channel.

    Attributes:
        weight: float32, [channels], without gaps.
        bias: likewise.
    """

    weight: np.ndarray
    bias: np.ndarray

    def __post_init__(self) -> None:
        shapes = {self.weight.shape, self.bias.shape}
        whole = all(each.dtype == np.float32 and each.flags.c_contiguous for each in (self.weight, self.bias))
        if len(shapes) != 1 or self.weight.ndim != 1 or not whole:
            raise InputError(f"weight and bias must be float32 without gaps, [channels] both, found {shapes}")


class Kernels:
    """A loaded library.

    Attributes:
        path: its file.
        amx: whether AMX may be used where the processor has it.
        convolver: convolves, where the processor has AMX and it may be used; otherwise None.
    """

    def __init__(self, path: Path, *, amx: bool = True) -> None:
        """Load a library.

        Args:
            path: its file.
            amx: whether AMX may be used.

        Raises:
            OSError: it cannot be loaded.
        """
        self.path, self.amx = path, amx
        library = ctypes.CDLL(str(path))
        self._attention = library.sdc_attention
        self._attention.argtypes = (ctypes.POINTER(_Attention),)
        self._attention.restype = ctypes.c_char_p
        self._group_norm = library.sdc_group_norm
        self._group_norm.argtypes = (ctypes.POINTER(_GroupNorm),)
        self._group_norm.restype = ctypes.c_char_p
        self._join = library.sdc_join_channels
        self._join.argtypes = (ctypes.POINTER(_Join),)
        self._join.restype = ctypes.c_char_p
        self._interleave = library.sdc_interleave
        self._interleave.argtypes = (ctypes.POINTER(_Interleave),)
        self._interleave.restype = ctypes.c_char_p
        self.convolver = Convolver(library) if amx and library.sdc_convolution_supported() else None
        self._instructions = library.sdc_attention_instructions
        self._instructions.argtypes = (ctypes.POINTER(_Attention),)
        self._instructions.restype = ctypes.c_char_p

    def instructions(self, *, causal: bool = False, eight_bits: bool = False) -> str | None:
        """The instruction set that an attention is computed with: "AMX_BF16", "AVX512_VNNI" or "AVX512_BF16".

        Args:
            causal: see `attend`.
            eight_bits: see `attend`.

        Returns:
            None if the processor has none of them.
        """
        call = _Attention(causal=causal, eight_bits=eight_bits, amx=self.amx)
        name: bytes | None = self._instructions(ctypes.byref(call))
        return None if name is None else name.decode()

    def attend(
        self,
        query: Rows,
        key: Rows,
        value: Rows,
        output: Rows,
        *,
        heads: int,
        scale: float,
        causal: bool = False,
        eight_bits: bool = False,
    ) -> None:
        """output = softmax(scale · query · keyᵀ) · value in each head, on the threads of the caller's TBB arena.

        Products are of bf16 and summed in float32; the softmax is computed in float32 and rounded to bf16. With
        `eight_bits`, products are of 8-bit integers, whose scales are found in each call, where the processor has
        AVX512_VNNI, attention is not causal, and AMX, which is faster in bf16, is not there or not to be used.

        Args:
            query: [B, Sq, heads · head_size]; likewise `output`.
            key: [B, Sk, heads · head_size]; likewise `value`.
            output: where the result is written; it must not overlap the others.
            heads: number of heads.
            scale: of the logits; positive.
            causal: query i sees the keys 0 to i only.
            eight_bits: faster, with relative errors of 0.01 to 0.03 in place of 0.002.

        Raises:
            InputError: sizes that do not fit each other, an odd head size, a scale that is not positive.
        """
        batch, queries, width = query.shape
        keys = key.shape[1]
        if tuple(output.shape) != tuple(query.shape) or not (
            tuple(key.shape) == tuple(value.shape) == (batch, keys, width) and heads > 0 and width % heads == 0
        ):
            shapes = ", ".join(str(tuple(rows.shape)) for rows in (query, key, value, output))
            raise InputError(f"query, key, value and output with {heads} heads do not fit each other: {shapes}")
        tensors = (rows.as_tensor(heads) for rows in (query, key, value, output))
        call = _Attention(*tensors, batch, heads, queries, keys, width // heads, scale, causal, eight_bits, self.amx)
        fault: bytes | None = self._attention(ctypes.byref(call))
        if fault is not None:
            raise InputError(f"attention cannot be computed: {fault.decode()}")

    def normalise_groups(
        self,
        input: Rows,
        output: Rows,
        affine: Affine,
        *,
        groups: int,
        epsilon: float,
        silu: bool = False,
        addend: Rows | None = None,
        summand: tuple[Rows, Rows] | None = None,
    ) -> None:
        """output = activation(normalised(input + addend) · weight + bias), on the threads of the caller's TBB arena.

        Mean and variance are those of each group of neighbouring channels in all pixels of an image, whatever their
        ratio is; sums are computed in float32 and float64, and rounded to bf16 at the end.

        Args:
            input: [B, pixels, channels].
            output: likewise; may be the input.
            affine: weight and bias of the channels.
            groups: number of groups; divides that of channels.
            epsilon: added to the variance; not negative.
            silu: whether x · sigmoid(x) follows.
            addend: [B, 1, channels], or [1, 1, channels] for all images; None for zeros.
            summand: other images that are added to the input first, and where the rounded sum is written, which may be
                either of them or the output; both like the input. None for zeros.

        Raises:
            InputError: sizes that do not fit each other, a negative epsilon.
        """
        batch, pixels, channels = input.shape
        addend_shapes = ((batch, 1, channels), (1, 1, channels))
        if (
            any(tuple(rows.shape) != tuple(input.shape) for rows in (output, *(summand or ())))
            or affine.weight.shape != (channels,)
            or (addend is not None and tuple(addend.shape) not in addend_shapes)
        ):
            shapes = ", ".join(str(tuple(rows.shape)) for rows in (input, output, addend, *(summand or ())) if rows)
            raise InputError(f"images and the weights of {len(affine.weight)} channels do not fit each other: {shapes}")
        addend_stride = 0 if addend is None or addend.shape[0] == 1 else addend.as_images().batch_stride
        call = _GroupNorm(
            input.as_images(),
            *((rows.as_images() for rows in summand) if summand else (Images(), Images())),
            output.as_images(),
            affine.weight.ctypes.data,
            affine.bias.ctypes.data,
            None if addend is None else addend.address,
            addend_stride,
            batch,
            pixels,
            channels,
            groups,
            epsilon,
            silu,
        )
        fault: bytes | None = self._group_norm(ctypes.byref(call))
        if fault is not None:
            raise InputError(f"groups cannot be normalised: {fault.decode()}")

    def join_channels(self, left: Rows, right: Rows, output: Rows) -> None:
        """output = the channels of the left images and then those of the right ones, on the caller's TBB arena.

        Args:
            left: [B, pixels, channels].
            right: likewise, with channels of its own number.
            output: [B, pixels, channels of both]; must not overlap the others.

        Raises:
            InputError: sizes that do not fit each other.
        """
        batch, pixels, channels = output.shape
        if (*left.shape[:2], *right.shape[:2]) != (batch, pixels) * 2 or left.shape[2] + right.shape[2] != channels:
            shapes = ", ".join(str(tuple(rows.shape)) for rows in (left, right, output))
            raise InputError(f"images to be joined do not fit each other: {shapes}")
        images = (rows.as_images() for rows in (left, right, output))
        fault: bytes | None = self._join(ctypes.byref(_Join(*images, batch, pixels, left.shape[2], right.shape[2])))
        if fault is not None:
            raise InputError(f"images cannot be joined: {fault.decode()}")

    def interleave(self, phases: Sequence[Rows], output: Rows, *, size: tuple[int, int]) -> None:
        """output[2y + a, 2x + b] = phases[2a + b][y, x], on the threads of the caller's TBB arena.

        Args:
            phases: four of [B, pixels, channels].
            output: [B, 4 · pixels, channels]; must not overlap the others.
            size: height and width of a phase.

        Raises:
            InputError: sizes that do not fit each other.
        """
        height, width = size
        batch, pixels, channels = output.shape
        expected = (batch, height * width, channels)
        if len(phases) != 4 or any(tuple(each.shape) != expected for each in phases) or pixels != 4 * height * width:
            shapes = ", ".join(str(tuple(rows.shape)) for rows in (*phases, output))
            raise InputError(f"phases of {height} x {width} and their images do not fit each other: {shapes}")
        images = (Images * 4)(*(rows.as_images() for rows in phases))
        call = _Interleave(images, output.as_images(), batch, height, width, channels)
        fault: bytes | None = self._interleave(ctypes.byref(call))
        if fault is not None:
            raise InputError(f"phases cannot be interleaved: {fault.decode()}")


def find_kernels() -> Kernels | str:
    """The kernels for this machine, built at the first call on it; or in one line why there are none."""
    with _finding:
        return _find_kernels(kernels_may_use_amx()) if kernels_wanted() else _SWITCHED_OFF


def find_convolver() -> Convolver | None:
    """What computes convolutions and products of matrices; None where that is left to the backend."""
    kernels = find_image_kernels()
    return None if kernels is None else kernels.convolver


def find_image_kernels() -> Kernels | None:
    """The kernels for images: norms, convolutions, layouts; None where these are left to the backend."""
    kernels = find_kernels()
    return kernels if isinstance(kernels, Kernels) and kernels_beyond_attention() else None


def missing_for_kernels() -> str | None:
    """What `find_kernels` would fail for, as far as can be told without building; None for nothing."""
    return missing_to_build() if kernels_wanted() else _SWITCHED_OFF


@functools.cache
def _find_kernels(amx: bool) -> Kernels | str:
    path = build_kernels()
    if isinstance(path, str):
        log.info("no CPU kernels: %s", path)
        return path
    try:
        kernels = Kernels(path, amx=amx)
    except OSError as error:
        return f"they cannot be loaded: {error}"
    return kernels if kernels.instructions() else "the processor has no AVX512_BF16 instructions"
