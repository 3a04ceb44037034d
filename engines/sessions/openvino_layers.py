"""Layers of OpenVINO models as the CPU kernels take them: operands, and the operator in a layer's place."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino

from sdc.engines.kernels.convolution import MOST_INTEGER_PRODUCTS, Convolver, Filter, Quantisation
from sdc.engines.kernels.rows import Rows
from sdc.engines.sessions.openvino_operators import KernelOperator, Replacements, constant_of, sole_reader

_LEVELS = 256
_NEARLY = 0.01
"""How far a zero point may be from an integer, as ranges are rounded to float16 on their way."""


@dataclass(frozen=True)
class LayerOperands:
    """What a layer multiplies.

    Attributes:
        input: before it is quantised.
        weights: of the constant: float32, uint16 with the bits of bf16, or int8.
        factors: float64, [outputs], what sums of products are multiplied with.
        quantisation: of the input, with weights in int8; otherwise None.
    """

    input: Any
    weights: np.ndarray
    factors: np.ndarray
    quantisation: Quantisation | None


@dataclass(frozen=True)
class KernelWeights:
    """What a layer multiplies with, and what becomes of the products; see `Convolver.convolve`.

    Attributes:
        filter: packed.
        factors: float32, [outputs], and those of the gates; likewise `offsets`.
        quantisation: of the input; None for none.
        margins: rows above images and columns left of them; None for half a window.
    """

    filter: Filter
    factors: np.ndarray
    offsets: np.ndarray
    quantisation: Quantisation | None
    margins: tuple[int, int] | None = None


class KernelLayer(KernelOperator):
    """input: [..., channels], bf16 → [..., outputs], bf16.

    Attributes:
        weights: None once it is released.
    """

    def __init__(
        self, convolver: Convolver, weights: KernelWeights, replacements: Replacements, inputs: list[Any]
    ) -> None:
        self.weights: KernelWeights | None = weights
        self._convolver = convolver
        self._outputs = weights.filter.shape[0]
        super().__init__(replacements, inputs)

    @abstractmethod
    def as_images(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """How many images an input of this shape is taken for, and their height and width."""

    def copy(self, inputs: list[Any]) -> KernelLayer:
        """Another one with the same weights."""
        assert self.weights is not None
        return type(self)(self._convolver, self.weights, self.replacements, inputs)

    def validate_and_infer_types(self) -> None:
        """The output is like the input but for the last dimension."""
        shape = self.get_input_partial_shape(0)
        shape[len(shape) - 1] = openvino.Dimension(self._outputs)
        self.set_output_type(0, self.get_input_element_type(0), shape)

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Run the kernel on the tensors' own memory."""
        assert self.weights is not None
        given = inputs[0].data
        outputs[0].shape = [*given.shape[:-1], self._outputs]
        batch, height, width = self.as_images(given.shape)
        self._convolver.convolve(
            Rows(given.ctypes.data, (batch, height * width, given.shape[-1])),
            Rows(outputs[0].data.ctypes.data, (batch, height * width, self._outputs)),
            self.weights.filter,
            size=(height, width),
            factors=self.weights.factors,
            offsets=self.weights.offsets,
            margins=self.weights.margins,
            quantisation=self.weights.quantisation,
        )
        return True

    def release(self) -> None:
        """Let the weights go."""
        super().release()
        self.weights = None


def operands_of(layer: Any, output_axis: int) -> LayerOperands | None:
    """Those of a Convolution or MatMul with constant weights; None where the kernels cannot take them.

    Args:
        layer: the node; its second input is the weights, of a fixed shape.
        output_axis: of the weights.
    """
    shape = tuple(layer.get_input_shape(1))
    outputs = shape[output_axis]
    weights = before_conversions(layer.input_value(1))
    if weights.get_node().get_type_name() == "Constant":
        if weights.get_element_type() not in (openvino.Type.bf16, openvino.Type.f16, openvino.Type.f32):
            return None
        return LayerOperands(layer.input_value(0), _array_of(weights.get_node()), np.ones(outputs), None)
    rounding = before_conversions(layer.input_value(0)).get_node()
    quantisation = _quantisation(rounding)
    integers, scales = _dequantised(weights.get_node(), shape, output_axis)
    if integers is None or scales is None or quantisation is None:
        return None
    if math.prod(shape) // outputs > MOST_INTEGER_PRODUCTS:
        return None
    factors = scales * quantisation.scale
    return LayerOperands(rounding.input_value(0), _array_of(integers), factors, quantisation)


def with_bias(result: Any, outputs: int, shapes: tuple[tuple[int, ...], ...]) -> tuple[Any, np.ndarray]:
    """A layer's output, or that of the sum with its bias where nothing else reads it; and the bias, float64, [outputs].

    Args:
        result: the layer's output.
        outputs: number of them.
        shapes: that the bias may have.
    """
    add = sole_reader(result)
    if add is not None and add.get_type_name() == "Add":
        constant = next((constant_of(port) for port in add.input_values() if port != result), None)
        if constant is not None and constant.shape in shapes:
            return add.output(0), constant.reshape(outputs).astype(np.float64)
    return result, np.zeros(outputs)


def before_conversions(value: Any) -> Any:
    """The output of floats whose numbers this is, in whatever type of floats."""
    while (
        value.get_node().get_type_name() == "Convert" and value.get_node().input_value(0).get_element_type().is_real()
    ):
        value = value.get_node().input_value(0)
    return value


def _array_of(constant: Any) -> np.ndarray:
    """In place; bf16 as its bits, as it looks like float16 otherwise."""
    values: np.ndarray = constant.data
    return values.view(np.uint16) if constant.get_output_element_type(0) == openvino.Type.bf16 else values


def _dequantised(product: Any, shape: tuple[int, ...], output_axis: int) -> tuple[Any, np.ndarray] | tuple[None, None]:
    """The constant of int8 weights, and their scales, of which there is one, or one for each output."""
    if product.get_type_name() != "Multiply":
        return None, None
    integers, scales = product.input_value(0).get_node(), constant_of(product.input_value(1))
    while integers.get_type_name() == "Convert":
        integers = integers.input_value(0).get_node()
    if integers.get_type_name() != "Constant" or integers.get_output_element_type(0) != openvino.Type.i8:
        return None, None
    per_output = tuple(size if axis == output_axis else 1 for axis, size in enumerate(shape))
    if scales is None or (scales.size != 1 and (1,) * (len(shape) - scales.ndim) + scales.shape != per_output):
        return None, None
    return integers, np.broadcast_to(scales.reshape(-1).astype(np.float64), (shape[output_axis],))


def _quantisation(node: Any) -> Quantisation | None:
    """That of a FakeQuantize to 256 levels of one range, which holds zero, or None for any other node."""
    if node.get_type_name() != "FakeQuantize" or node.get_attributes()["levels"] != _LEVELS:
        return None
    bounds = [constant_of(node.input_value(index)) for index in range(1, 5)]
    if any(bound is None or bound.size != 1 for bound in bounds):
        return None
    low, high, output_low, output_high = (float(bound.reshape(())) for bound in bounds if bound is not None)
    scale = (high - low) / (_LEVELS - 1)
    if (
        not (low <= 0 <= high and scale > np.finfo(np.float32).tiny)
        or max(abs(output_low - low), abs(output_high - high)) > scale * _NEARLY
    ):
        return None
    zero_point = -low / scale
    if abs(zero_point - round(zero_point)) > _NEARLY:
        return None
    return Quantisation(scale, round(zero_point))
