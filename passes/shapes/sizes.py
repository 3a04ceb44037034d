"""Sizes of tensors as integers or expressions of the graph's free sizes, and their arithmetic.

A `Size` is an int or an `onnx_ir.SymbolicDim`; two sizes are known to be equal if their expressions are. Contents of
integer tensors that hold sizes are NumPy arrays of objects, on which ``+``, ``-``, ``*`` and ``//`` work as on numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

import onnx_ir as ir

_CLAMPED = re.compile(r"Min\((\d+), (.*)\)")

Size = int | ir.SymbolicDim
Sizes = tuple[Size, ...]


def normal_size(size: object) -> Size | None:
    """The size in the one spelling that makes equal expressions equal; None for an unknown one."""
    if isinstance(size, int):
        return size
    if not isinstance(size, ir.SymbolicDim):
        return int(size)  # type: ignore[call-overload, no-any-return]
    return None if size.value is None else _parse(size.value)


@cache
def _parse(text: str) -> Size:
    try:
        parsed = (ir.SymbolicDim(text) + 0).evaluate({})
    except ValueError:  # a name that is no expression, such as "batch size"
        return ir.SymbolicDim(re.sub(r"\W", "_", text))
    return parsed


def symbols(size: Size) -> frozenset[str]:
    """Names of the free sizes in an expression."""
    return frozenset() if isinstance(size, int) else size.free_symbols()


def product(sizes: Iterable[Size]) -> Size:
    """Number of elements."""
    total: Size = 1
    for size in sizes:
        total = add_up(total * size)
    return total


def add_up(size: Size) -> Size:
    """The result of an operation on sizes as an int where it is one."""
    return size if isinstance(size, int) else size.evaluate({})


def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` rounded down, of sizes that are not negative; None for a number by a free size."""
    return None if isinstance(a, int) and not isinstance(b, int) else add_up(a // b)  # type: ignore[operator]


def clamped(size: Size, limit: int) -> Size:
    """What a slice up to `size` takes of `limit` elements."""
    return min(size, limit) if isinstance(size, int) else _parse(f"Min({limit}, {size.value})")


def _is_clamped(a: Size | None, b: Size | None) -> bool:
    """Whether `a` is `b`, but at most some limit over 1."""
    found = _CLAMPED.fullmatch(a.value or "") if isinstance(a, ir.SymbolicDim) and b is not None else None
    return found is not None and int(found[1]) > 1 and _parse(found[2]) == b


def broadcast_size(a: Size | None, b: Size | None) -> Size | None:
    """The size that two meet in; None if one is unknown, or both are free and not known to be equal.

    A size meets itself clamped only where they are equal: position embeddings are cut to the number of tokens.
    """
    if a == 1 or _is_clamped(a, b):
        return b
    if b == 1 or (a is not None and a == b) or _is_clamped(b, a):
        return a
    if isinstance(a, int) or isinstance(b, int):
        return a if isinstance(a, int) else b
    return None


def broadcast_sizes(shapes: Sequence[Sequence[Size | None]]) -> tuple[Size | None, ...]:
    """Shape of an element-wise result.

    Source: ONNX, multidirectional broadcasting.
    """
    rank = max(map(len, shapes))
    result: list[Size | None] = [1] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, rank - len(shape)):
            result[axis] = broadcast_size(result[axis], size)
    return tuple(result)
