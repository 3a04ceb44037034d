"""Arithmetic on sizes, done when an OpenVINO model is written rather than at each start.

OpenVINO's ONNX frontend computes shapes and axes in the graph, also where they are known: for the scales of each
quantised weight, the bias of each convolution and the axes of each norm. In SD 1.5's UNet in int8 that is 2,302 of
7,960 nodes, which every pass of the plugin goes through again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
from openvino.op import Constant


def fold_sizes(model: openvino.Model) -> int:
    """Put a constant in the place of each node whose value does not depend on inputs and cannot be another elsewhere.

    1. ``ShapeOf`` of a tensor whose shape is static.
    2. An operator on constants that gives integers, but for ``Convert``: quantised weights are left to the plugin.
    3. ``Reshape`` of a constant, of whichever type: its bytes stay.

    Not folded: arithmetic in floating point, which the plugin may do in another type than that of the constants.

    Args:
        model: changed in place.

    Returns:
        The number of nodes that were replaced.
    """
    folded = 0
    for node in model.get_ordered_ops():
        value = _known_value(node)
        if value is not None:
            constant = Constant(value)
            constant.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(constant.output(0))
            folded += 1
    return folded


def _known_value(node: Any) -> openvino.Tensor | None:
    kind = node.get_type_name()
    if node.get_output_size() != 1 or node.get_output_partial_shape(0).is_dynamic or kind == "Convert":
        return None
    if kind == "ShapeOf" and node.get_input_partial_shape(0).is_static:
        return openvino.Tensor(np.array(node.get_input_shape(0), node.get_output_element_type(0).to_dtype()))
    sources = [value.get_node() for value in node.input_values()]
    if not sources or any(source.get_type_name() != "Constant" for source in sources):
        return None
    if kind != "Reshape" and not node.get_output_element_type(0).is_integral_number():
        return None
    result = openvino.Tensor(node.get_output_element_type(0), node.get_output_shape(0))
    return result if node.evaluate([result], [source.get_tensor_view() for source in sources]) else None
