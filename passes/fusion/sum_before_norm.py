"""The sum in front of a GroupNorm, as the fused operators take it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sdc.passes.matching import constant, dimensions, producer, same_size

TIME_EMBEDDING_ADD = "conv_time_embedding_add"
SKIP_ADD = "skip_add"
OTHER = "other"


@dataclass(frozen=True)
class Terms:
    """The two terms of a sum.

    Attributes:
        x: the branch (a Conv's output where there is one); it has the sum's shape.
        addend: what is added to it: of the sum's shape, or one value per channel.
        form: TIME_EMBEDDING_ADD, SKIP_ADD or OTHER.
    """

    x: ir.Value
    addend: ir.Value
    form: str


def match_sum(add: ir.Node, norm: ir.Node) -> Terms | str:
    """The terms of `add` in the fused operators' order, or why it cannot be fused with `norm`, its reader."""
    if any(constant(parameter) is None for parameter in norm.inputs[1:]):
        return "gamma or beta is computed, expected initialisers"
    first, second = add.inputs
    assert first is not None
    assert second is not None
    total = dimensions(add.outputs[0])
    if total is None or dimensions(first) is None or dimensions(second) is None:
        return "the shape of the sum or of a term is unknown"
    # The branch comes first: a Conv's output where only one term is one.
    if producer(first, "Conv") is None and producer(second, "Conv") is not None:
        first, second = second, first
    for x, addend in ((first, second), (second, first)):
        if equal_sizes(dimensions(x), total):
            if equal_sizes(dimensions(addend), total):
                return Terms(x, addend, SKIP_ADD)
            if _is_per_channel(dimensions(addend), total):
                return Terms(x, addend, TIME_EMBEDDING_ADD if producer(x, "Conv") else OTHER)
    return f"terms {dimensions(first)} and {dimensions(second)} are neither equal nor one value per channel"


def equal_sizes(a: tuple[int | str | None, ...] | None, b: tuple[int | str | None, ...] | None) -> bool:
    """Whether two shapes are known to be equal."""
    return a is not None and b is not None and len(a) == len(b) and all(map(same_size, a, b))


def _is_per_channel(addend: tuple[int | str | None, ...] | None, total: tuple[int | str | None, ...]) -> bool:
    return (
        addend is not None
        and len(addend) == len(total)
        and (addend[0] == 1 or same_size(addend[0], total[0]))
        and same_size(addend[1], total[1])
        and all(size == 1 for size in addend[2:])
    )
