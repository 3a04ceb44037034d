"""What a layer computes in, and how its weight is stored."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """The precision of one layer, by its name on the command line and in plans.

    ``INT8`` and ``FP8`` quantise activations and weights; ``W8`` and ``W4`` the weights alone, and what they multiply
    stays in floating point.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    W8 = "w8"
    W4 = "w4"
    FP8 = "fp8"


FLOATING = frozenset({Format.FP32, Format.FP16, Format.BF16})
WEIGHTS_ONLY = frozenset({Format.W8, Format.W4})
CALIBRATED = frozenset({Format.INT8, Format.FP8})
"""Formats whose activations need ranges."""

BLOCK_SIZES = (32, 64, 128)
"""Weights of one row that share a scale in ``W4``."""
