"""Pairs of quantisation and dequantisation as one operator, as OpenVINO's own quantisers write them.

OpenVINO's ONNX frontend leaves a pair apart::

    Multiply(Subtract(Convert(Convert(FakeQuantize(x, low, high, -128, 127), i8), f32), zero point), scale)
        →  FakeQuantize(x, low, high, (-128 - zero point) · scale, (127 - zero point) · scale)

Apart, the plugin takes the integers as they are, and where they have a zero point, OpenVINO 2026.4 computes the
convolution behind them in float32 on processors with AMX: a step of SD 1.5's UNet took 2.7 s there, and in one operator
0.7 s. From one operator it chooses the integers itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
from openvino import opset13 as operators

_INTEGERS = ("i8", "u8")


def fold_pairs(model: openvino.Model) -> int:
    """Put one FakeQuantize in the place of each pair on a tensor; weights, which are integers already, are left.

    Args:
        model: changed in place.

    Returns:
        The number of pairs.
    """
    folded = 0
    for node in model.get_ordered_ops():
        chain = _dequantising_chain(node) if node.get_type_name() == "FakeQuantize" else None
        if chain is None:
            continue
        result, zero_point, scale = chain
        bounds = [_constant(node.input_value(index)) for index in (3, 4)]
        if any(bound is None for bound in bounds):
            continue
        floats = [operators.constant((bound - zero_point) * scale) for bound in bounds]
        levels = node.get_attributes()["levels"]
        whole = operators.fake_quantize(*node.input_values()[:3], *floats, levels)
        element_type = result.get_output_element_type(0)
        if whole.get_output_element_type(0) != element_type:
            whole = operators.convert(whole, element_type.to_string())
        whole.set_friendly_name(result.get_friendly_name())
        result.output(0).replace(whole.output(0))
        folded += 1
    return folded


def _dequantising_chain(quantise: Any) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """The last node of a pair with its zero point and scale; None if what follows is none."""
    integers = _sole_reader(quantise, "Convert")
    if integers is None or integers.get_output_element_type(0).to_string() not in _INTEGERS:
        return None
    last = _sole_reader(integers, "Convert")
    zero_point = np.zeros((), np.float32)
    shift = _sole_reader(last, "Subtract")
    if shift is not None:
        constant = _constant(shift.input_value(1))
        if constant is None:
            return None
        last, zero_point = shift, constant
    product = _sole_reader(last, "Multiply")
    scale = None if product is None else _constant(product.input_value(1))
    return None if scale is None else (product, zero_point, scale)


def _sole_reader(node: Any, kind: str) -> Any | None:
    """What reads a node's result, if that is one operator, of this kind, on its first input."""
    readers = [] if node is None else list(node.output(0).get_target_inputs())
    if len(readers) != 1 or readers[0].get_index() != 0 or readers[0].get_node().get_type_name() != kind:
        return None
    return readers[0].get_node()


def _constant(value: Any) -> np.ndarray | None:
    """A constant's float32, behind conversions of its type or not."""
    node = value.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return np.asarray(node.data, np.float32) if node.get_type_name() == "Constant" else None
