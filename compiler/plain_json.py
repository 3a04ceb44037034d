"""Values as JSON can hold them."""

from __future__ import annotations

import math
from typing import Any


def finite_json(value: Any) -> Any:
    """The same value with lists for tuples and null for numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
