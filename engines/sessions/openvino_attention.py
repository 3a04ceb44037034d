"""Attention of our own kernels inside of an OpenVINO model.

`ScaledDotProductAttention` between the split and the merge of heads becomes one operator on [B, S, heads · head_size]::

    split(x) = Transpose(Reshape(x, [0, 0, heads, d]), [0, 2, 1, 3])
    y = Reshape(Transpose(ScaledDotProductAttention(split(q), split(k), split(v)), [0, 2, 1, 3]), [0, 0, heads · d])
        →  y = Convert(KernelAttention(Convert(q, bf16), Convert(k, bf16), Convert(v, bf16)), type of y)

The plugin computes in bf16 around it, so the conversions are copies at most. Where y is rounded to 8 bits next, as by a
quantised projection, so may be what attention multiplies.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as operators

from sdc.engines.kernels.library import Kernels
from sdc.engines.kernels.rows import Rows
from sdc.engines.sessions.openvino_operators import (
    KernelOperator,
    Replacements,
    constant_of,
    sole_reader,
    static_shapes,
)

log = logging.getLogger(__name__)

_SPLIT = (0, 2, 1, 3)
"""[B, S, heads, head_size] ↔ [B, heads, S, head_size]."""
_LEAST_PRODUCTS = 20_000_000
"""About where the kernel begins to be faster (scripts/bench_attention.py): a call costs some 50 µs of Python."""
_BYTE_LEVELS = 256


@dataclass(frozen=True)
class Settings:
    """An attention without its operands; see `Kernels.attend`."""

    heads: int
    scale: float
    causal: bool
    eight_bits: bool


@dataclass(frozen=True)
class _Site:
    """One attention in a model.

    Attributes:
        operands: query, key and value before their heads were split; outputs of nodes, [B, S, heads · head_size].
        result: the last node of the pattern; its output is what the operator's takes the place of.
        settings: what is computed.
    """

    operands: tuple[Any, ...]
    result: Any
    settings: Settings


class KernelAttention(KernelOperator):
    """q, k, v: [B, S, heads · head_size], bf16 → attention, as q.

    Attributes:
        settings: what is computed.
    """

    def __init__(self, settings: Settings, kernels: Kernels, replacements: Replacements, inputs: list[Any]) -> None:
        self.settings = settings
        self._kernels = kernels
        super().__init__(replacements, inputs)

    def copy(self, inputs: list[Any]) -> KernelAttention:
        """Another one of the same settings."""
        return KernelAttention(self.settings, self._kernels, self.replacements, inputs)

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Run the kernel on the tensors' own memory."""
        outputs[0].shape = list(inputs[0].data.shape)  # arrays tell their shapes in a thirtieth of the time of tensors
        rows = [Rows(array.ctypes.data, array.shape) for array in (tensor.data for tensor in (*inputs, outputs[0]))]
        settings = self.settings
        self._kernels.attend(
            *rows,
            heads=settings.heads,
            scale=settings.scale,
            causal=settings.causal,
            eight_bits=settings.eight_bits,
        )
        return True


def replace_attention(
    model: openvino.Model,
    kernels: Kernels,
    shapes: Mapping[str, tuple[int, ...]],
    replacements: Replacements,
    *,
    eight_bits: bool = True,
) -> None:
    """Put the kernel in the place of every attention that it computes faster.

    Not replaced: attention with a mask, with heads that are not split and merged as above, or whose number or size of
    heads is not static; odd head sizes; small ones, where calling Python costs more than the kernel saves.

    Args:
        model: changed in place; it has to be compiled for bf16.
        kernels: loaded.
        shapes: of the inputs by name, with which small attentions are told.
        replacements: to which the operators are added.
        eight_bits: whether products may be of 8-bit integers where the result is rounded to 8 bits.
    """
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    products = _count_products(model, found, shapes)
    sites = [
        site
        for node, count in zip(found, products, strict=True)
        if count >= _LEAST_PRODUCTS and (site := _match(node, eight_bits=eight_bits)) is not None
    ]
    for site in sites:
        halves = [operators.convert(operand, "bf16") for operand in site.operands]
        attention = KernelAttention(site.settings, kernels, replacements, [half.output(0) for half in halves])
        element_type = site.result.get_output_element_type(0)
        whole = operators.convert(attention, element_type.to_string())
        whole.set_friendly_name(site.result.get_friendly_name())
        site.result.output(0).replace(whole.output(0))
    instructions = Counter(
        kernels.instructions(causal=site.settings.causal, eight_bits=site.settings.eight_bits) for site in sites
    )
    how = ", ".join(f"{count} with {name}" for name, count in instructions.items())
    log.info("%d of %d attentions run in the CPU kernels: %s", len(sites), len(found), how or "none")


def _count_products(model: openvino.Model, attentions: list[Any], shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """B · heads · Sq · Sk · head_size of each attention, when the model's inputs have these shapes."""
    if not attentions:
        return []
    with static_shapes(model, shapes):
        return [_products_of(attention) for attention in attentions]


def _products_of(attention: Any) -> int:
    query, key = (attention.get_input_partial_shape(index) for index in (0, 1))
    static = query.is_static and key.is_static and len(query) == len(key) == 4
    return math.prod(query.to_shape()) * int(key.to_shape()[2]) if static else 0


def _match(attention: Any, *, eight_bits: bool) -> _Site | None:
    """The pattern around a ScaledDotProductAttention, or None if it is another."""
    inputs = attention.input_values()
    operands = tuple(_before_split(value) for value in inputs[:3])
    result = _after_merge(attention.output(0))
    shapes = {_heads_and_size(value) for value in inputs[:3]}
    mask = _scalar(inputs[3]) if len(inputs) > 3 else 0.0
    if result is None or None in operands or len(shapes) != 1 or mask != 0.0:
        return None
    (shape,) = shapes
    if shape is None or shape[1] % 2 != 0:
        return None
    scale = _scalar(inputs[4]) if len(inputs) > 4 else shape[1] ** -0.5
    if scale is None or scale <= 0:
        return None
    causal = bool(attention.get_attributes()["causal"])
    in_bytes = eight_bits and _is_rounded_to_bytes(result.output(0))
    return _Site(operands, result, Settings(shape[0], scale, causal, in_bytes))


def _heads_and_size(value: Any) -> tuple[int, int] | None:
    """Of [B, heads, S, head_size]."""
    shape = value.get_partial_shape()
    if shape.rank.is_dynamic or len(shape) != 4 or shape[1].is_dynamic or shape[3].is_dynamic:
        return None
    return shape[1].get_length(), shape[3].get_length()


def _before_split(value: Any) -> Any | None:
    """x of Transpose(Reshape(x)), if that splits heads."""
    transpose = value.get_node()
    if not _swaps_heads(transpose):
        return None
    reshape = transpose.input_value(0).get_node()
    source = reshape.input_value(0) if reshape.get_type_name() == "Reshape" else None
    return source if source is not None and _keeps_batch_and_rows(reshape, ranks=(3, 4)) else None


def _after_merge(value: Any) -> Any | None:
    """The Reshape of Reshape(Transpose(value)), if that merges heads and nothing else reads them."""
    transpose = sole_reader(value)
    if transpose is None or not _swaps_heads(transpose):
        return None
    reshape = sole_reader(transpose.output(0))
    if reshape is None or reshape.get_type_name() != "Reshape":
        return None
    return reshape if _keeps_batch_and_rows(reshape, ranks=(4, 3)) else None


def _is_rounded_to_bytes(value: Any) -> bool:
    """Whether all that reads a value, behind conversions of its type, rounds it to 256 levels or fewer."""
    readers = [port.get_node() for port in value.get_target_inputs()]
    return bool(readers) and all(
        _is_rounded_to_bytes(reader.output(0))
        if reader.get_type_name() == "Convert"
        else reader.get_type_name() == "FakeQuantize" and reader.get_attributes()["levels"] <= _BYTE_LEVELS
        for reader in readers
    )


def _swaps_heads(node: Any) -> bool:
    if node.get_type_name() != "Transpose":
        return False
    order = constant_of(node.input_value(1))
    return order is not None and tuple(order.tolist()) == _SPLIT


def _keeps_batch_and_rows(reshape: Any, *, ranks: tuple[int, int]) -> bool:
    """Whether only dimensions behind the first two change: [B, S, …] → [0, 0 or -1, …], all others static."""
    shapes = (reshape.get_input_partial_shape(0), reshape.get_output_partial_shape(0))
    if any(shape.rank.is_dynamic for shape in shapes) or tuple(map(len, shapes)) != ranks:
        return False
    inner = [list(shape)[2:] for shape in shapes]
    if any(dimension.is_dynamic for dimensions in inner for dimension in dimensions):
        return False
    sizes = [int(np.prod([dimension.get_length() for dimension in dimensions])) for dimensions in inner]
    target = constant_of(reshape.input_value(1))
    if target is None or not reshape.get_attributes()["special_zero"]:
        return False
    return sizes[0] == sizes[1] and target[0] == 0 and target[1] in (0, -1)


def _scalar(value: Any) -> float | None:
    """A constant of one element."""
    constant = constant_of(value)
    return float(constant.reshape(())) if constant is not None and constant.size == 1 else None
