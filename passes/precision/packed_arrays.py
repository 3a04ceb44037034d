"""Arrays of numbers as short JSON values."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np


def pack(array: np.ndarray) -> dict[str, Any]:
    """A compressed array with its element type; `unpack` is the inverse. Equal arrays give equal text."""
    plain = np.ascontiguousarray(array)
    raw = zlib.compress(plain.astype(plain.dtype.newbyteorder("<")).tobytes(), 9)
    return {"dtype": plain.dtype.name, "shape": list(plain.shape), "zlib": base64.b64encode(raw).decode("ascii")}


def unpack(value: dict[str, Any]) -> np.ndarray:
    """Read what `pack` wrote.

    Raises:
        ValueError: it is damaged.
    """
    try:
        raw = zlib.decompress(base64.b64decode(value["zlib"], validate=True))
    except zlib.error as error:
        raise ValueError(f"damaged array: {error}") from error
    dtype = np.dtype(value["dtype"])
    return np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype).reshape(value["shape"])
