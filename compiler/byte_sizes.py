"""Sizes of memory as people write them."""

from __future__ import annotations

import re

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d*)?)\s*([A-Za-z]+)")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "1.5GiB", "4 GB" or "900MiB", in powers of 1000 or, with an i, of 1024.

    Raises:
        ValueError: the text is no such size, or less than a byte; what argparse makes a message of.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = next((each for each in _UNITS if match and each.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise ValueError(f"{text!r} is no size; write it as 1.5GiB, with one of the units {', '.join(_UNITS)}")
    count = int(float(match[1]) * _UNITS[unit])
    if count < 1:
        raise ValueError(f"{text!r} is less than a byte")
    return count


def gibibytes(count: int) -> str:
    """A size in units of 2³⁰ bytes, and smaller ones in units of 2²⁰."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
