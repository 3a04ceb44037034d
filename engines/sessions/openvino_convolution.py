"""Convolutions of our own kernel inside of an OpenVINO model.

OpenVINO's convolution computes 16 pixels of a row with weights that it has loaded, or fewer where rows are shorter, and
loads them again. With the small images and many channels in the middle of a UNet that is most of its time. So ::

    y = Convolution(x, weights) + bias
    y = Convolution(FakeQuantize(x), Convert(int8 weights) · scales) + bias

become one operator on channels last, y = first(KernelConvolution(last(x))); see `openvino_layout`. In the second one x
is quantised by the kernel.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino

from sdc.engines.kernels.convolution import Convolver, Filter, Quantisation
from sdc.engines.sessions.openvino_layout import before_conversions, channels_last, put_in_place_of, rows_of
from sdc.engines.sessions.openvino_operators import (
    KernelOperator,
    Replacements,
    constant_of,
    sole_reader,
    static_shapes,
)

log = logging.getLogger(__name__)

_MOST_PIXELS = 2048
"""Of all images together; above that OpenVINO's convolution reuses weights as well."""
_LEAST_PRODUCTS = 2e8
"""Some 0.2 ms of work, beside the 0.1 ms that an operator in Python costs."""
_LEVELS = 256
_NEARLY = 0.01
"""How far a zero point may be from an integer, as ranges are rounded to float16 on their way."""


@dataclass(frozen=True)
class _Site:
    """One convolution in a model.

    Attributes:
        images: what is convolved, before it is quantised.
        weights: the constant's node, of float32, bf16 or int8.
        result: the output that the operator's takes the place of.
        scales: [outputs], of the weights' integers, float64; None for weights in floating point.
        bias: [outputs], float64.
        quantisation: of the images; None for weights in floating point.
    """

    images: Any
    weights: Any
    result: Any
    scales: np.ndarray | None
    bias: np.ndarray
    quantisation: Quantisation | None


class KernelConvolution(KernelOperator):
    """images: [B, H, W, C], bf16 → convolved, [B, H, W, outputs], bf16.

    Attributes:
        filter: the weights; likewise `factors` and `offsets`, see `Convolver.convolve`.
        quantisation: of the images; None for none.
    """

    def __init__(
        self,
        convolver: Convolver,
        filter: Filter,
        factors: np.ndarray,
        offsets: np.ndarray,
        quantisation: Quantisation | None,
        replacements: Replacements,
        inputs: list[Any],
    ) -> None:
        self._convolver = convolver
        self.filter, self.factors, self.offsets, self.quantisation = filter, factors, offsets, quantisation
        super().__init__(replacements, inputs)

    def copy(self, inputs: list[Any]) -> KernelConvolution:
        """Another one with the same weights."""
        return KernelConvolution(
            self._convolver, self.filter, self.factors, self.offsets, self.quantisation, self.replacements, inputs
        )

    def validate_and_infer_types(self) -> None:
        """The output is like the input but for the number of channels."""
        shape = self.get_input_partial_shape(0)
        shape[3] = openvino.Dimension(self.filter.shape[0])
        self.set_output_type(0, self.get_input_element_type(0), shape)

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Run the kernel on the tensors' own memory."""
        images = inputs[0].data
        outputs[0].shape = [*images.shape[:3], self.filter.shape[0]]
        self._convolver.convolve(
            rows_of(images),
            rows_of(outputs[0].data),
            self.filter,
            size=images.shape[1:3],
            factors=self.factors,
            offsets=self.offsets,
            quantisation=self.quantisation,
        )
        return True

    def release(self) -> None:
        """Let the weights go."""
        super().release()
        self.filter = Filter(np.empty(0, np.uint8), None, self.filter.shape)


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
    candidates = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    if not candidates:
        return
    with static_shapes(model, shapes):
        worthwhile = [node for node in candidates if _is_worthwhile(node)]
    sites = [site for node in worthwhile if (site := _match(node)) is not None]
    for site in sites:
        _replace(site, convolver, replacements)
    log.info("%d of %d convolutions run in the CPU kernels", len(sites), len(candidates))


def _is_worthwhile(convolution: Any) -> bool:
    batch, _, height, width = convolution.get_output_shape(0)
    pixels = batch * height * width
    return pixels <= _MOST_PIXELS and pixels * math.prod(convolution.get_input_shape(1)) >= _LEAST_PRODUCTS


def _replace(site: _Site, convolver: Convolver, replacements: Replacements) -> None:
    weights = site.weights.data  # bf16 looks like float16 here
    packed = convolver.pack(weights.view(np.uint16) if weights.dtype == np.float16 else weights)
    factors = np.ones(packed.shape[0])
    if site.scales is not None and site.quantisation is not None:
        factors = site.scales * site.quantisation.scale
    operator = KernelConvolution(
        convolver,
        packed,
        factors.astype(np.float32),
        site.bias.astype(np.float32),
        site.quantisation,
        replacements,
        [channels_last(site.images)],
    )
    put_in_place_of(site.result, operator.output(0))


def _match(convolution: Any) -> _Site | None:
    """The pattern around a convolution, or None if it is another."""
    attributes = convolution.get_attributes()
    outputs, _, window, width = convolution.get_input_shape(1)
    margins = [window // 2, window // 2]
    if (
        window != width
        or window % 2 == 0
        or window == 1  # a product of matrices, which OpenVINO blocks better
        or attributes["strides"] != [1, 1]
        or attributes["dilations"] != [1, 1]
        or attributes["auto_pad"].lower() != "explicit"
        or attributes["pads_begin"] != margins
        or attributes["pads_end"] != margins
    ):
        return None
    images, weights = (before_conversions(convolution.input_value(index)) for index in (0, 1))
    result, bias = _with_bias(convolution.output(0), outputs)
    if weights.get_node().get_type_name() == "Constant":
        if weights.get_element_type() not in (openvino.Type.bf16, openvino.Type.f32):
            return None
        return _Site(convolution.input_value(0), weights.get_node(), result, None, bias, None)
    integers, scales = _dequantised(weights.get_node(), outputs)
    quantisation = _quantisation(images.get_node())
    if integers is None or quantisation is None:
        return None
    return _Site(images.get_node().input_value(0), integers, result, scales, bias, quantisation)


def _with_bias(result: Any, outputs: int) -> tuple[Any, np.ndarray]:
    """The convolution's output, or that of the sum with its bias, and the bias."""
    add = sole_reader(result)
    if add is not None and add.get_type_name() == "Add":
        constant = next((constant_of(port) for port in add.input_values() if port != result), None)
        if constant is not None and constant.shape == (1, outputs, 1, 1):
            return add.output(0), constant.reshape(outputs).astype(np.float64)
    return result, np.zeros(outputs)


def _dequantised(product: Any, outputs: int) -> tuple[Any, np.ndarray] | tuple[None, None]:
    """The constant of int8 weights, and their scales."""
    if product.get_type_name() != "Multiply":
        return None, None
    integers = before_conversions(product.input_value(0)).get_node()
    scales = constant_of(product.input_value(1))
    if integers.get_type_name() != "Constant" or integers.get_output_element_type(0) != openvino.Type.i8:
        return None, None
    if scales is None or scales.size not in (1, outputs):
        return None, None
    return integers, np.broadcast_to(scales.reshape(-1).astype(np.float64), (outputs,))


def _quantisation(node: Any) -> Quantisation | None:
    """That of a FakeQuantize to 256 levels of one range, which holds zero, or None for any other node."""
    if node.get_type_name() != "FakeQuantize" or node.get_attributes()["levels"] != _LEVELS:
        return None
    bounds = [constant_of(node.input_value(index)) for index in range(1, 5)]
    if any(bound is None or bound.size != 1 for bound in bounds):
        return None
    low, high, output_low, output_high = (float(bound.reshape(())) for bound in bounds if bound is not None)
    scale = (high - low) / (_LEVELS - 1)
    if not (low <= 0 <= high and scale > 0) or max(abs(output_low - low), abs(output_high - high)) > scale * _NEARLY:
        return None
    zero_point = -low / scale
    if abs(zero_point - round(zero_point)) > _NEARLY:
        return None
    return Quantisation(scale, round(zero_point))
