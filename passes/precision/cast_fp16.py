"""cast-fp16: compute in float16, with float32 where float16 would break."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.precision.cast_half import CastHalf


@dataclass(frozen=True)
class CastFp16(CastHalf):
    """Float16; see `CastHalf`."""

    name: ClassVar[str] = "cast-fp16"
    dtype: ClassVar[ir.DataType] = ir.DataType.FLOAT16
