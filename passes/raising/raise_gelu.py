"""Recognise GELU in its two spellings, by the error function and by tanh."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import (
    dimensions,
    is_close,
    is_operator,
    producer,
    replace_by_several,
    scalar,
    site,
    sole_consumer,
)

_CUBIC = 0.044715
"""Source: Hendrycks and Gimpel, arXiv:1606.08415, section 2, the tanh approximation."""


@dataclass(frozen=True)
class RaiseGelu(Pass):
    """Every GELU is one node `Gelu`.

    Source: Hendrycks and Gimpel, arXiv:1606.08415, section 2.

    Before → after, factors in any order and grouping::

        0.5 * x * (1 + Erf(x / sqrt(2)))                               →  Gelu(x)
        0.5 * x * (1 + Tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))      →  Gelu(x), approximate = tanh

    Preconditions:

    1. The numbers are those above, in the precision of x's element type.
    2. Nothing else reads the function's result nor the sum, up to the product.
    3. The product has no other factors: a gate (GEGLU) multiplies the complete GELU.

    Not matched: QuickGELU; the sigmoid approximation.
    """

    name: ClassVar[str] = "raise-gelu"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites; error functions and tanh that stay are reported as skipped."""
        matched = 0
        skipped: list[Skipped] = []
        for node in [each for each in model.graph if is_operator(each, "Erf") or is_operator(each, "Tanh")]:
            x = _erf_argument(node) if node.op_type == "Erf" else _tanh_argument(node)
            old = None if x is None else _product(node, x)
            if x is None or old is None:
                skipped.append(Skipped(site(node), "the argument is not GELU's" if x is None else "the product is not"))
                continue
            if dimensions(old[-1].outputs[0]) != dimensions(x):
                skipped.append(Skipped(site(node), "a number adds axes to the result"))
                continue
            attributes = {} if node.op_type == "Erf" else {"approximate": "tanh"}
            raised = ir.node("Gelu", [x], attributes)
            replace_by_several(old, [raised], old[-1].outputs, raised.outputs, at=old[-1])
            matched += 1
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))


def _factors(value: ir.Value | None, opaque: frozenset[ir.Value | None]) -> tuple[float, Counter[ir.Value | None]]:
    """`value` as a number times a product of values; those in `opaque` are not looked into."""
    number = scalar(value)
    if number is not None:
        return number, Counter()
    node = None if value in opaque or value is None else value.producer()
    if is_operator(node, "Mul"):
        (a, left), (b, right) = (_factors(factor, opaque) for factor in node.inputs)  # type: ignore[union-attr]
        return a * b, left + right
    if is_operator(node, "Div") and (divisor := scalar(node.inputs[1])):  # type: ignore[union-attr]
        number, rest = _factors(node.inputs[0], opaque)  # type: ignore[union-attr]
        return number / divisor, rest
    if (power := producer(value, "Pow")) is not None and value not in opaque and scalar(power.inputs[1]) in (2.0, 3.0):
        exponent = int(scalar(power.inputs[1]) or 0)
        number, rest = _factors(power.inputs[0], opaque)
        return number**exponent, Counter({each: count * exponent for each, count in rest.items()})
    return 1.0, Counter([value])


def _erf_argument(node: ir.Node) -> ir.Value | None:
    scaled = node.inputs[0]
    inner = producer(scaled, "Div") or producer(scaled, "Mul")
    for x in inner.inputs if inner is not None else ():
        if x is not None and scalar(x) is None:
            number, rest = _factors(scaled, frozenset({x}))
            if rest == Counter([x]) and is_close(number, math.sqrt(0.5), x.dtype):
                return x
    return None


def _tanh_argument(node: ir.Node) -> ir.Value | None:
    scale, rest = _factors(node.inputs[0], frozenset())
    total = next(iter(rest), None) if rest.total() == 1 else None
    add = producer(total, "Add")
    for x, cube in (add.inputs, reversed(add.inputs)) if add is not None else ():
        if x is None or not is_close(scale, math.sqrt(2 / math.pi), x.dtype):
            continue
        number, powers = _factors(cube, frozenset({x}))
        if powers == Counter([x, x, x]) and is_close(number, _CUBIC, x.dtype):
            return x
    return None


def _product(function: ir.Node, x: ir.Value) -> list[ir.Node] | None:
    """The nodes from the function to ``0.5 * x * (1 + function)``."""
    add = sole_consumer(function.outputs[0])
    if add is None or not is_operator(add, "Add") or 1.0 not in map(scalar, add.inputs):
        return None
    nodes, total = [function, add], add.outputs[0]
    for _ in range(2):
        node = sole_consumer(nodes[-1].outputs[0])
        if node is None or not (is_operator(node, "Mul") or is_operator(node, "Div")):
            return None
        nodes.append(node)
        number, rest = _factors(node.outputs[0], frozenset({x, total}))
        if rest == Counter([x, total]) and is_close(number, 0.5, x.dtype):
            return nodes
    return None
