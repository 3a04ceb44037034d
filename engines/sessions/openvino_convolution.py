"""Convolutions of our own kernel inside of an OpenVINO model.

OpenVINO's convolution computes 16 pixels of a row with weights that it has loaded, or fewer where rows are shorter, and
loads them again. With the small images and many channels in the middle of a UNet that is most of its time. So ::

    y = Convolution(x, weights) + bias
    y = Convolution(FakeQuantize(x), Convert(int8 weights) · scales) + bias

become one operator on channels last, y = first(KernelConvolution(last(x))); see `openvino_layout`. In the second one x
is quantised by the kernel. With a window of 1 it is a product of matrices, which takes the kernel no more time; then
images need not leave their layout, and float16 weights are not kept in float32 beside the packed ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino

from sdc.engines.kernels.convolution import Convolver
from sdc.engines.sessions.openvino_layers import KernelLayer, KernelWeights, LayerOperands, operands_of, with_bias
from sdc.engines.sessions.openvino_layout import channels_last, put_in_place_of
from sdc.engines.sessions.openvino_operators import Replacements, static_shapes

log = logging.getLogger(__name__)

_MOST_PIXELS = 2048
"""Of all images together; above that OpenVINO's convolution reuses weights as well."""
_IMAGE_RANK = 4
_MOST_ROWS = 8192
"""Of a product of matrices, which a window of 1 is: more were not measured."""
_LEAST_PRODUCTS = 2e8
"""Some 0.2 ms of work, beside the 0.1 ms that an operator in Python costs."""


@dataclass(frozen=True)
class _Site:
    """One convolution in a model.

    Attributes:
        operands: its own.
        result: the output that the operator's takes the place of.
        bias: [outputs], float64.
        margins: rows above images and columns left of them.
    """

    operands: LayerOperands
    result: Any
    bias: np.ndarray
    margins: tuple[int, int]


class KernelConvolution(KernelLayer):
    """images: [B, H, W, C], bf16 → convolved, [B, H, W, outputs], bf16."""

    def as_images(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """With a window of 1 pixels do not see each other, and are the columns of one row."""
        batch, height, width, _ = shape
        is_product = self.weights is not None and self.weights.filter.shape[2] == 1
        return (1, 1, batch * height * width) if is_product else (batch, height, width)


def replace_convolutions(
    model: openvino.Model, convolver: Convolver, shapes: Mapping[str, tuple[int, ...]], replacements: Replacements
) -> None:
    """Put the kernel in the place of every convolution that it computes faster.

    Args:
        model: changed in place; it has to be compiled for bf16.
        convolver: loaded.
        shapes: of the inputs by name, with which large images are told.
        replacements: to which the operators are added.
    """
    candidates = _convolutions(model)
    count = 0
    for node in _worthwhile(model, candidates, shapes):
        site = _match(node)
        if site is not None:  # what it reads may be another one's result, which was replaced just now
            _replace(site, convolver, replacements)
            count += 1
    log.info("%d of %d convolutions run in the CPU kernels", count, len(candidates))


def convolutions_taken(model: openvino.Model, shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Names of the convolutions that `replace_convolutions` would find in a model that nothing was replaced in."""
    found = _worthwhile(model, _convolutions(model), shapes)
    return frozenset(node.get_friendly_name() for node in found if _match(node) is not None)


def _convolutions(model: openvino.Model) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]


def _worthwhile(model: openvino.Model, candidates: list[Any], shapes: Mapping[str, tuple[int, ...]]) -> list[Any]:
    if not candidates:
        return []
    with static_shapes(model, shapes):
        return [node for node in candidates if _is_worthwhile(node)]


def _is_worthwhile(convolution: Any) -> bool:
    shapes = (convolution.get_output_partial_shape(0), convolution.get_input_partial_shape(1))
    if any(shape.is_dynamic or len(shape) != _IMAGE_RANK for shape in shapes):
        return False
    batch, _, height, width = convolution.get_output_shape(0)
    pixels = batch * height * width
    most = _MOST_ROWS if convolution.get_input_shape(1)[2] == 1 else _MOST_PIXELS
    return bool(pixels <= most and pixels * math.prod(convolution.get_input_shape(1)) >= _LEAST_PRODUCTS)


def _replace(site: _Site, convolver: Convolver, replacements: Replacements) -> None:
    operands = site.operands
    weights = KernelWeights(
        convolver.pack(operands.weights),
        operands.factors.astype(np.float32),
        site.bias.astype(np.float32),
        operands.quantisation,
        site.margins,
    )
    operator = KernelConvolution(convolver, weights, replacements, [channels_last(operands.input)])
    put_in_place_of(site.result, operator.output(0))


def _match(convolution: Any) -> _Site | None:
    """The pattern around a convolution, or None if it is another."""
    attributes = convolution.get_attributes()
    outputs, _, window, width = convolution.get_input_shape(1)
    begins, ends = attributes["pads_begin"], attributes["pads_end"]
    if (
        window != width
        or attributes["strides"] != [1, 1]
        or attributes["dilations"] != [1, 1]
        or attributes["auto_pad"].lower() != "explicit"
        or any(begin + end != window - 1 or min(begin, end) < 0 for begin, end in zip(begins, ends, strict=True))
    ):
        return None
    operands = operands_of(convolution, output_axis=0)
    result, bias = with_bias(convolution.output(0), outputs, ((1, outputs, 1, 1),))
    return None if operands is None else _Site(operands, result, bias, (begins[0], begins[1]))
