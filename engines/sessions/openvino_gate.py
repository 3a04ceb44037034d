"""Gated layers of our own kernel inside of an OpenVINO model.

The first layer of a feed-forward network is two products, of which one gates the other::

    y = (MatMul(x, w1) + b1) · Gelu(MatMul(x, w2) + b2)

OpenVINO writes the first product to memory and reads it again; one operator has both sums at the same time.
Where x is quantised and weights are int8, the kernel quantises it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as operators

from sdc.engines.kernels.convolution import Convolver
from sdc.engines.sessions.openvino_layers import (
    KernelLayer,
    KernelWeights,
    LayerOperands,
    before_conversions,
    operands_of,
    with_bias,
)
from sdc.engines.sessions.openvino_operators import Replacements, sole_reader, static_shapes

log = logging.getLogger(__name__)

_TOKENS_RANK, _MATRIX_RANK = 3, 2
_LEAST_PRODUCTS = 4e8
"""Some 0.4 ms of work, beside the 0.1 ms that an operator in Python costs."""


@dataclass(frozen=True)
class _Site:
    """One gated layer in a model.

    Attributes:
        products: the MatMul of the values, and that of the gates.
        operands: likewise; their inputs are the same.
        biases: likewise, float64, [outputs].
        result: what the operator's output takes the place of.
    """

    products: tuple[Any, Any]
    operands: tuple[LayerOperands, LayerOperands]
    biases: tuple[np.ndarray, np.ndarray]
    result: Any


class KernelGate(KernelLayer):
    """tokens: [B, S, K], bf16 → gated, [B, S, outputs], bf16."""

    def as_images(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """One, of one row: tokens do not see each other."""
        return 1, 1, math.prod(shape[:-1])


def replace_gates(
    model: openvino.Model, convolver: Convolver, shapes: Mapping[str, tuple[int, ...]], replacements: Replacements
) -> None:
    """Put the kernel in the place of every gated layer that it computes faster.

    Args:
        model: changed in place; it has to be compiled for bf16.
        convolver: loaded.
        shapes: of the inputs by name, with which small layers are told.
        replacements: to which the operators are added.
    """
    gates = _gelus(model)
    worthwhile = _worthwhile(model, gates, shapes)
    for node in worthwhile:
        site = _match(node)
        if site is not None:  # what it reads may be another one's result, which was replaced just now
            _replace(site, convolver, replacements)
    log.info("%d of %d gated layers run in the CPU kernels", len(worthwhile), len(gates))


def gates_taken(model: openvino.Model, shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Names of the products that `replace_gates` would find in a model that nothing was replaced in."""
    sites = [_match(node) for node in _worthwhile(model, _gelus(model), shapes)]
    return frozenset(product.get_friendly_name() for site in sites if site is not None for product in site.products)


def _gelus(model: openvino.Model) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "Gelu"]


def _worthwhile(model: openvino.Model, gates: list[Any], shapes: Mapping[str, tuple[int, ...]]) -> list[Any]:
    if not gates:
        return []
    with static_shapes(model, shapes):
        return [node for node in gates if (site := _match(node)) is not None and _is_worthwhile(site)]


def _is_worthwhile(site: _Site) -> bool:
    """All shapes are static."""
    tokens = math.prod(site.products[0].get_input_shape(0)[:-1])
    return bool(2 * tokens * math.prod(site.products[0].get_input_shape(1)) >= _LEAST_PRODUCTS)


def _replace(site: _Site, convolver: Convolver, replacements: Replacements) -> None:
    values, gates = site.operands
    weights = KernelWeights(
        convolver.pack(values.weights.T, gates.weights.T),
        np.concatenate([values.factors, gates.factors]).astype(np.float32),
        np.concatenate(site.biases).astype(np.float32),
        values.quantisation,
    )
    tokens = operators.convert(before_conversions(values.input), "bf16").output(0)
    operator = KernelGate(convolver, weights, replacements, [tokens])
    whole = operators.convert(operator, site.result.get_element_type().to_string())
    whole.set_friendly_name(site.result.get_node().get_friendly_name())
    site.result.replace(whole.output(0))


def _match(gelu: Any) -> _Site | None:
    """The pattern around a Gelu, or None if it is another."""
    product = sole_reader(gelu.output(0))
    if gelu.get_attributes()["approximation_mode"].upper() != "ERF":
        return None
    if product is None or product.get_type_name() != "Multiply":
        return None
    others = [port for port in product.input_values() if port != gelu.output(0)]
    if len(others) != 1:
        return None
    sides = [_side(others[0], product), _side(gelu.input_value(0), gelu)]
    if any(side is None for side in sides):
        return None
    (values, operands, bias), (gates, gate_operands, gate_bias) = (side for side in sides if side is not None)
    if operands.input != gate_operands.input or operands.quantisation != gate_operands.quantisation:
        return None
    if (operands.weights.shape, operands.weights.dtype) != (gate_operands.weights.shape, gate_operands.weights.dtype):
        return None
    return _Site((values, gates), (operands, gate_operands), (bias, gate_bias), product.output(0))


def _side(value: Any, reader: Any) -> tuple[Any, LayerOperands, np.ndarray] | None:
    """The MatMul of tokens with a matrix that a value comes from, which nothing but `reader` reads; and its bias."""
    node = value.get_node()
    matmul = node
    if node.get_type_name() == "Add":
        matmul = next(
            (port.get_node() for port in node.input_values() if port.get_node().get_type_name() == "MatMul"), node
        )
    if matmul.get_type_name() != "MatMul" or any(matmul.get_attributes()[f"transpose_{side}"] for side in "ab"):
        return None
    tokens, matrix = (matmul.get_input_partial_shape(index) for index in (0, 1))
    if tokens.rank.is_dynamic or len(tokens) != _TOKENS_RANK or matrix.is_dynamic or len(matrix) != _MATRIX_RANK:
        return None
    outputs = matmul.get_input_shape(1)[1]
    result, bias = with_bias(matmul.output(0), outputs, ((outputs,), (1, outputs), (1, 1, outputs)))
    read_once = sole_reader(result)
    if result != value or read_once is None or read_once.get_friendly_name() != reader.get_friendly_name():
        return None
    operands = operands_of(matmul, output_axis=1)
    return None if operands is None else (matmul, operands, bias)
