"""Convolutions of images that were doubled by repeating their pixels."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sdc.passes.matching import constant, constant_tensor, is_operator, producer, sole_consumer
from sdc.passes.precision.correct_bias import EXACT_WEIGHT
from sdc.passes.shapes.shape_rules import whole_shape
from sdc.passes.shapes.sizes import add_up

_REPEATING = {
    "asymmetric": ("floor", "round_prefer_floor"),
    **dict.fromkeys(
        ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners"),
        ("round_prefer_floor", "round_prefer_ceil"),
    ),
}
"""Roundings with which pixel i of a doubled image is pixel floor(i / 2), by where its coordinate is taken to be.

Source: ONNX operator specification, Resize 19. The coordinate is i / 2 if asymmetric, i / 2 - 1/4 in half pixels, and
i / 2 · (1 - 1 / (2n - 1)) between aligned corners, which is less than a quarter from floor(i / 2) + 1/4.
"""

_WANTED = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1], "dilations": [1, 1]}
"""Attributes of the convolution."""
_DEFAULTS = _WANTED | {"pads": [0, 0, 0, 0]}
"""What they are where they are not written; a kernel's size is its weight's."""


@dataclass(frozen=True)
class Kernel:
    """The weight of a site.

    Attributes:
        exact: [O, I, 3, 3], floating point.
        stored: the initialiser: the same, or its integers.
        dequantise: what stands between integers and the Conv, or None.
        scale: of the integers, or None.
    """

    exact: ir.TensorProtocol
    stored: ir.Value
    dequantise: ir.Node | None = None
    scale: ir.TensorProtocol | None = None


@dataclass(frozen=True)
class Upsampler:
    """A site.

    Attributes:
        resize: doubles the image.
        pair: QuantizeLinear and DequantizeLinear behind it, or nothing.
        conv: the one that reads the result.
        kernel: of it.
    """

    resize: ir.Node
    pair: tuple[ir.Node, ...]
    conv: ir.Node
    kernel: Kernel


def match_upsampler(resize: ir.Node) -> Upsampler | str:
    """The site that begins with a Resize, or why it is none."""
    reason = _reason_against_resize(resize)
    if reason is not None:
        return reason
    pair: list[ir.Node] = []
    value = resize.outputs[0]
    reader = sole_consumer(value)
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        if reader is not None and is_operator(reader, op_type):
            pair.append(reader)
            value = reader.outputs[0]
            reader = sole_consumer(value)
    if reader is None or not is_operator(reader, "Conv") or reader.inputs[0] is not value or len(pair) == 1:
        return "its result is read by something else than one Conv, or one pair that one Conv reads"
    reason = _reason_against_conv(reader)
    if reason is not None:
        return reason
    kernel = _match_kernel(reader)
    return kernel if isinstance(kernel, str) else Upsampler(resize, tuple(pair), reader, kernel)


def _reason_against_resize(resize: ir.Node) -> str | None:
    attributes = resize.attributes
    mode = attributes.get_string("mode", "nearest")
    coordinates = attributes.get_string("coordinate_transformation_mode", "half_pixel")
    rounding = attributes.get_string("nearest_mode", "round_prefer_floor")
    if mode != "nearest":
        return f"it interpolates ({mode}), expected nearest neighbours"
    if rounding not in _REPEATING.get(coordinates or "", ()):
        return f"it does not repeat pixels: {coordinates} coordinates, rounded by {rounding}"
    if "axes" in attributes or attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "it has axes or a policy of its own, expected sizes or scales of all four axes"
    return None if _doubles(resize) else "rows and columns, and they alone, are not known to be doubled"


def _doubles(resize: ir.Node) -> bool:
    """Whether the result has twice as many rows and columns, by constant scales or by shapes."""
    scales = constant(resize.inputs[2]) if len(resize.inputs) > 2 else None
    if scales is not None and scales.size:
        return bool(scales.tolist() == [1, 1, 2, 2])
    small, large = whole_shape(resize.inputs[0]), whole_shape(resize.outputs[0])
    if small is None or large is None or len(small) != 4:
        return False
    return large == (*small[:2], *(add_up(2 * size) for size in small[2:]))


def _reason_against_conv(conv: ir.Node) -> str | None:
    for name, wanted in _WANTED.items():
        found = list(conv.attributes.get_ints(name, _DEFAULTS[name]) or ())
        if found != wanted:
            return f"the Conv behind it has {name} {found}, expected {wanted}"
    groups, padding = conv.attributes.get_int("group", 1), conv.attributes.get_string("auto_pad", "NOTSET")
    if groups != 1 or padding != "NOTSET":
        return f"the Conv behind it has {groups} groups and padding {padding}, expected one and explicit padding"
    return None


def _match_kernel(conv: ir.Node) -> Kernel | str:
    value = conv.inputs[1]
    dequantise = producer(value, "DequantizeLinear")
    stored = value if dequantise is None else dequantise.inputs[0]
    tensor = constant_tensor(stored)
    if stored is None or tensor is None:
        return "the weight of the Conv behind it is computed, or stored in blocks"
    kernel: Kernel | None = Kernel(tensor, stored) if dequantise is None else _quantised(conv, stored, dequantise)
    if kernel is None:
        return f"the weight of the Conv behind it is {tensor.dtype.name}, expected float, or int8 made from it here"
    sizes = tuple(kernel.exact.shape.numpy()[2:])
    return kernel if sizes == (3, 3) else f"the Conv behind it has a kernel of {sizes}, expected 3 x 3"


def _quantised(conv: ir.Node, stored: ir.Value, dequantise: ir.Node) -> Kernel | None:
    """A weight of symmetric int8 whose exact values are known; None for another one."""
    exact = conv.meta.get(EXACT_WEIGHT)
    scale = constant_tensor(dequantise.inputs[1])
    if exact is None or scale is None or stored.dtype != ir.DataType.INT8 or len(dequantise.inputs) > 2:
        return None
    by_output = scale.size == 1 or dequantise.attributes.get_int("axis", 1) == 0
    return Kernel(exact, stored, dequantise, scale) if by_output else None
