"""Reads operands of attention: which tensor is multiplied, without numbers, conversions and folded heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from sdc.passes.matching import dimensions, is_operator, permutation, producer, same_size
from sdc.passes.raising.attention_scores import step_over_number


@dataclass(frozen=True)
class Operand:
    """A tensor times a number.

    Attributes:
        value: the tensor.
        scale: the number.
        order: a transposition to apply to it; None for none.
    """

    value: ir.Value
    scale: float = 1.0
    order: tuple[int, ...] | None = None

    @property
    def sizes(self) -> tuple[int | str | None, ...]:
        """Shape, transposed."""
        shape = dimensions(self.value) or ()
        return tuple(shape[axis] for axis in self.order) if self.order is not None else shape


def read_operand(value: ir.Value) -> Operand:
    """`value` without numbers and conversions."""
    scale = 1.0
    while (step := step_over_number(value.producer())) is not None:
        value, factor = step
        scale *= factor
    return Operand(value, scale)


def read_transposed(value: ir.Value) -> Operand:
    """The operand whose last two dimensions `value` swaps.

    A Transpose in any order that swaps them as well is undone; between two Reshapes that fold the heads into the batch
    and unfold them again (torch's decomposition) it is too; anything else gets a transposition of its own.
    """
    found = read_operand(value)
    rank = len(dimensions(found.value) or ())
    swap = (*range(rank - 2), rank - 1, rank - 2)
    unfolded = _between_folds(found.value)
    transpose = producer(found.value, "Transpose")
    if unfolded is not None:
        source, order = unfolded, None
    elif transpose is not None and transpose.inputs[0] is not None and permutation(transpose):
        swapped = permutation(transpose)
        source = transpose.inputs[0]
        order = tuple(swapped[axis] for axis in swap)
    else:
        source, order = found.value, swap
    if order == tuple(range(rank)):
        order = None
    inner = read_operand(source)
    return Operand(inner.value, found.scale * inner.scale, order)


def _between_folds(value: ir.Value) -> ir.Value | None:
    """x: [B, h, S, d] of ``Reshape(Transpose(Reshape(x, [B * h, S, d]), [0, 2, 1]), [B, h, d, S])``."""
    unfold = producer(value, "Reshape")
    transpose = producer(unfold.inputs[0], "Transpose") if unfold is not None else None
    fold = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if fold is None or transpose is None or permutation(transpose) != (0, 2, 1):
        return None
    old, middle, new = dimensions(fold.inputs[0]), dimensions(fold.outputs[0]), dimensions(value)
    if old is None or middle is None or new is None or len(old) != 4 or len(new) != 4 or None in old:
        return None
    if (*old[:2], old[3], old[2]) != new or old[2:] != middle[1:]:
        return None
    return fold.inputs[0]


def unfold_heads(operand: Operand) -> Operand | None:
    """x: [B, h, S, d] of ``Reshape(x, [B * h, S, d])``; None if the operand is nothing like it."""
    fold = producer(operand.value, "Reshape")
    if fold is None or fold.inputs[0] is None or operand.order is not None:
        return None
    old, new = dimensions(fold.inputs[0]), dimensions(operand.value)
    if old is None or new is None or (len(old), len(new)) != (4, 3) or None in old:
        return None
    if not all(map(same_size, old[2:], new[1:])) or not isinstance(old[1], int):
        return None
    inner = read_operand(fold.inputs[0])
    return Operand(inner.value, operand.scale * inner.scale)


def unscale_projection(operand: Operand, new: list[ir.Node]) -> Operand:
    """Move a number from in front of the head split into the operand: ``Transpose(Reshape(x * c))``.

    A Transpose and a Reshape of ``x`` itself are added to `new`; the old ones may have other readers.
    """
    transpose = producer(operand.value, "Transpose")
    reshape = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or operand.order is not None:
        return operand
    step = step_over_number(reshape.inputs[0].producer() if reshape.inputs[0] is not None else None)
    if step is None or step[1] == 1.0 or is_operator(step[0].producer(), "Cast"):
        return operand
    source, factor = step
    if source.dtype != reshape.outputs[0].dtype:
        return operand
    value = source
    for node in (reshape, transpose):
        copy = ir.node(node.op_type, [value, *node.inputs[1:]], node.attributes)
        copy.outputs[0].type, copy.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        new.append(copy)
        value = copy.outputs[0]
    return replace(operand, value=value, scale=operand.scale * factor)
