"""cast-bf16: compute in bfloat16, which has float32's range and 8 bits of precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.precision.cast_half import CastHalf


@dataclass(frozen=True)
class CastBf16(CastHalf):
    """Bfloat16; see `CastHalf`."""

    name: ClassVar[str] = "cast-bf16"
    dtype: ClassVar[ir.DataType] = ir.DataType.BFLOAT16
