"""A linear layer's bias, found behind its MatMul."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sdc.passes.matching import constant, dimensions, producer, sole_consumer


@dataclass(frozen=True)
class BiasedProduct:
    """``add = Add(product, bias)``.

    Attributes:
        product: the output of a MatMul.
        bias: an initialiser, [C].
        add: the node that adds them; it has a single reader.
    """

    product: ir.Value
    bias: ir.Value
    add: ir.Node


def match_biased_product(value: ir.Value | None) -> BiasedProduct | None:
    """MatMul → Add of an initialiser [C] behind `value`, which only one node reads; None if it is anything else."""
    add = producer(value, "Add")
    if value is None or add is None or sole_consumer(value) is None:
        return None
    width = (dimensions(value) or (None,))[-1]
    for product, bias in (add.inputs, tuple(reversed(add.inputs))):
        if product is None or bias is None or producer(product, "MatMul") is None:
            continue
        if constant(bias) is not None and isinstance(width, int) and dimensions(bias) == (width,):
            return BiasedProduct(product, bias, add)
    return None
