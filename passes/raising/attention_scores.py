"""Reads attention scores: which product a Softmax is taken of, by what it is scaled, and what masks it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sdc.passes.matching import FLOATS, consumers, is_operator, producer, sole_consumer
from sdc.passes.raising.causal_pattern import HIDDEN
from sdc.passes.simplify.drop_neutral import uniform_value


@dataclass(frozen=True)
class Scores:
    """``scale * (query @ transposed_key) + mask``.

    Attributes:
        product: the MatMul.
        scale: product of all numbers on the way.
        mask: what is added; None for nothing.
        allowed: a condition instead of an added mask: scores stay where it is `allowed_when`, and are `fill` elsewhere.
    """

    product: ir.Node
    scale: float
    mask: ir.Value | None = None
    allowed: ir.Value | None = None
    allowed_when: bool = True
    fill: float = 0.0


def read_scores(value: ir.Value | None) -> Scores | str:
    """Scores behind a Softmax's operand, or why they cannot be told."""
    scale = 1.0
    masks: list[Scores] = []
    while True:
        node = None if value is None else value.producer()
        if is_operator(node, "MatMul"):
            assert node is not None
            found = masks[0] if masks else Scores(node, 1.0)
            return Scores(node, scale, found.mask, found.allowed, found.allowed_when, found.fill)
        if node is None or node.domain != "":
            return "the scores are not a MatMul"
        step = step_over_number(node)
        if step is not None:
            value, factor = step
            scale *= factor
            continue
        mask = _read_mask(node)
        if mask is None:
            return f"{node.op_type} stands between MatMul and Softmax"
        if masks or scale != 1.0:
            return "several masks" if masks else "the mask is scaled with the scores"
        masks.append(mask[1])
        value = mask[0]


def step_over_number(node: ir.Node | None) -> tuple[ir.Value, float] | None:
    """The operand of a conversion (1) or of a product with a number, and the number; None for other nodes."""
    if node is None or node.domain != "":
        return None
    if node.op_type == "Cast":
        source = node.inputs[0]
        if source is None or source.dtype not in FLOATS or node.outputs[0].dtype not in FLOATS:
            return None
        return source, 1.0
    if node.op_type not in ("Mul", "Div"):
        return None
    a, b = node.inputs
    number = uniform_value(b)
    if number is not None and a is not None:
        return a, number if node.op_type == "Mul" else 1 / number
    number = uniform_value(a) if node.op_type == "Mul" else None
    return None if number is None or b is None else (b, number)


def _read_mask(node: ir.Node) -> tuple[ir.Value, Scores] | None:
    """The scores before a mask, and the mask."""
    if node.op_type == "Add":
        found = [_leads_to_product(value) for value in node.inputs]
        if found.count(True) != 1:
            return None
        scores, mask = node.inputs if found[0] else reversed(node.inputs)
        assert scores is not None
        return scores, Scores(node, 1.0, mask=mask)
    if node.op_type != "Where":
        return None
    condition, kept, other = node.inputs
    for scores, fill, when in ((kept, uniform_value(other), True), (other, uniform_value(kept), False)):
        if fill is not None and fill <= HIDDEN and scores is not None:
            return scores, Scores(node, 1.0, allowed=condition, allowed_when=when, fill=fill)
    return None


def _leads_to_product(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    while (step := step_over_number(node)) is not None:
        node = step[0].producer()
    if is_operator(node, "Add") or is_operator(node, "Where"):
        return any(_leads_to_product(operand) for operand in node.inputs)  # type: ignore[union-attr]
    return is_operator(node, "MatMul")


def read_weighted_sum(softmax: ir.Node) -> ir.Node | None:
    """The MatMul of the probabilities with the values; None if there is none.

    Between them may stand conversions, and torch's guard against rows without any key: ``Where(IsNaN(p), 0, p)``.
    """
    value = softmax.outputs[0]
    while True:
        readers = consumers(value)
        guard = next((node for node in readers if is_operator(node, "Where")), None)
        if guard is not None and len(readers) == 2 and _is_guard(guard, value):
            value = guard.outputs[0]
            continue
        reader = sole_consumer(value)
        if is_operator(reader, "Cast"):
            assert reader is not None
            value = reader.outputs[0]
            continue
        return reader if is_operator(reader, "MatMul") and reader is not None and reader.inputs[0] is value else None


def _is_guard(where: ir.Node, value: ir.Value) -> bool:
    check = producer(where.inputs[0], "IsNaN")
    return (
        check is not None
        and check.inputs[0] is value
        and where.inputs[2] is value
        and uniform_value(where.inputs[1]) == 0.0
    )
