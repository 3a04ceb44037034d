"""Images with channels last inside of an OpenVINO model, whose own images have them first.

The plugin keeps channels last in memory between convolutions, and sees that a transpose to or from there moves nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
from openvino import opset13 as operators

from sdc.engines.kernels.library import Kernels
from sdc.engines.kernels.rows import Rows
from sdc.engines.sessions.openvino_layers import before_conversions
from sdc.engines.sessions.openvino_operators import KernelOperator, Replacements, constant_of

_TO_LAST = [0, 2, 3, 1]
_TO_FIRST = [0, 3, 1, 2]
_UNLIMITED = -1
"""What OpenVINO gives as the highest length of a free dimension."""


def channels_last(images: Any) -> Any:
    """[B, C, H, W] of any type → [B, H, W, C], bf16; of what lay so before, that itself."""
    images = before_conversions(images)
    if not _is_transpose(images.get_node(), _TO_FIRST):
        return operators.convert(operators.transpose(images, _TO_LAST), "bf16").output(0)
    last = before_conversions(images.get_node().input_value(0))
    return last if last.get_element_type() == openvino.Type.bf16 else operators.convert(last, "bf16").output(0)


def put_in_place_of(old: Any, images: Any) -> None:
    """Have all that reads an output, [B, C, H, W], read these images, [B, H, W, C] in bf16; as they are if it can."""
    for reader in [port.get_node() for port in old.get_target_inputs()]:
        if _is_transpose(reader, _TO_LAST):
            ports = reader.output(0).get_target_inputs()
            for last in [port.get_node().output(0) for port in ports]:
                if last.get_node().get_type_name() == "Convert" and last.get_element_type() == openvino.Type.bf16:
                    last.replace(images)
            typed = operators.convert(images, old.get_element_type().to_string())
            typed.set_friendly_name(reader.get_friendly_name())
            reader.output(0).replace(typed.output(0))
    whole = operators.transpose(operators.convert(images, old.get_element_type().to_string()), _TO_FIRST)
    whole.set_friendly_name(old.get_node().get_friendly_name())
    old.replace(whole.output(0))


class KernelJoin(KernelOperator):
    """Two images, [B, H, W, C] each, bf16 → their channels, [B, H, W, sum of C]."""

    def __init__(self, kernels: Kernels, replacements: Replacements, inputs: list[Any]) -> None:
        self._kernels = kernels
        super().__init__(replacements, inputs)

    def copy(self, inputs: list[Any]) -> KernelJoin:
        """Another one."""
        return KernelJoin(self._kernels, self.replacements, inputs)

    def validate_and_infer_types(self) -> None:
        """The output is like the first input but for the number of channels."""
        shape = self.get_input_partial_shape(0)
        channels = sum(self.get_input_partial_shape(index)[3].get_length() for index in range(2))
        shape[3] = openvino.Dimension(channels)
        self.set_output_type(0, self.get_input_element_type(0), shape)

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Run the kernel on the tensors' own memory."""
        left, right = (tensor.data for tensor in inputs)
        outputs[0].shape = [*left.shape[:3], left.shape[3] + right.shape[3]]
        self._kernels.join_channels(rows_of(left), rows_of(right), rows_of(outputs[0].data))
        return True


def join_channels_last(model: openvino.Model, kernels: Kernels, replacements: Replacements) -> None:
    """Join images along their channels where they lie last, if what reads them wants them so.

    Left to itself, the plugin moves them to channels first and back, once kernels stand before and behind.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Concat" or node.get_attributes()["axis"] not in (1, -3):
            continue
        joined = node.output(0)
        wanted = any(_is_transpose(port.get_node(), _TO_LAST) for port in joined.get_target_inputs())
        if wanted and node.get_input_size() == 2 and all(map(_has_channels, node.input_values())):
            inputs = [channels_last(value) for value in node.input_values()]
            put_in_place_of(joined, KernelJoin(kernels, replacements, inputs).output(0))


def add_channels_last(model: openvino.Model) -> None:
    """Add images where their channels lie last, if both operands have them so."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Add" or not node.get_output_element_type(0).is_real():
            continue
        operands = [before_conversions(value) for value in node.input_values()]
        if all(_is_transpose(value.get_node(), _TO_FIRST) for value in operands):
            left, right = (channels_last(value) for value in operands)
            put_in_place_of(node.output(0), operators.add(left, right).output(0))


class KernelInterleave(KernelOperator):
    """Four images, [B, H, W, C] each, bf16 → [B, 2H, 2W, C]: of every two by two pixels one of each."""

    def __init__(self, kernels: Kernels, replacements: Replacements, inputs: list[Any]) -> None:
        self._kernels = kernels
        super().__init__(replacements, inputs)

    def copy(self, inputs: list[Any]) -> KernelInterleave:
        """Another one."""
        return KernelInterleave(self._kernels, self.replacements, inputs)

    def validate_and_infer_types(self) -> None:
        """The output is like the inputs but for its size."""
        shape = self.get_input_partial_shape(0)
        for axis in (1, 2):
            shape[axis] = _doubled(shape[axis])
        self.set_output_type(0, self.get_input_element_type(0), shape)

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Run the kernel on the tensors' own memory."""
        phases = [tensor.data for tensor in inputs]
        batch, height, width, channels = phases[0].shape
        outputs[0].shape = [batch, 2 * height, 2 * width, channels]
        rows = [rows_of(phase) for phase in phases]
        self._kernels.interleave(rows, rows_of(outputs[0].data), size=(height, width))
        return True


def interleave_channels_last(model: openvino.Model, kernels: Kernels, replacements: Replacements) -> None:
    """Put the kernel in the place of each DepthToSpace of four phases, which are joined for that only.

    Args:
        model: changed in place; it has to be compiled for bf16.
        kernels: loaded.
        replacements: to which the operators are added.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "DepthToSpace":
            continue
        attributes, joined = node.get_attributes(), node.input_value(0).get_node()
        if attributes["mode"] != "blocks_first" or attributes["block_size"] != 2 or joined.get_type_name() != "Concat":
            continue
        phases = joined.input_values()
        if joined.get_attributes()["axis"] not in (1, -3) or len(phases) != 4 or not all(map(_has_channels, phases)):
            continue
        if len({value.get_partial_shape()[1].get_length() for value in phases}) != 1:
            continue
        operator = KernelInterleave(kernels, replacements, [channels_last(value) for value in phases])
        put_in_place_of(node.output(0), operator.output(0))


def _doubled(dimension: openvino.Dimension) -> openvino.Dimension:
    lowest, highest = dimension.get_min_length(), dimension.get_max_length()
    return openvino.Dimension(2 * lowest, highest if highest == _UNLIMITED else 2 * highest)


def rows_of(images: np.ndarray) -> Rows:
    """[B, H, W, C] as [B, H · W, C]."""
    batch, height, width, channels = images.shape
    return Rows(images.ctypes.data, (batch, height * width, channels))


def _has_channels(value: Any) -> bool:
    """Whether it is of images, [B, C, H, W], whose number of channels is known."""
    shape = value.get_partial_shape()
    return bool(shape.rank.is_static and len(shape) == len(_TO_FIRST) and shape[1].is_static)


def _is_transpose(node: Any, order: list[int]) -> bool:
    if node.get_type_name() != "Transpose":
        return False
    constant = constant_of(node.input_value(1))
    return constant is not None and constant.tolist() == order
