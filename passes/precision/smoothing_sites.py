"""Tensors whose channels can be scaled without changing what a graph computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Skipped
from sdc.passes.matching import constant, constant_tensor, dimensions, is_operator, producer, site, sole_consumer
from sdc.passes.precision.quantisation import Kind, Layer

_AFFINE_OF_IMAGES = {("", "GroupNormalization"): (1, 2), (domain.DOMAIN, domain.ADD_GROUP_NORM): (2, 3)}
"""Inputs that scale and shift the first output of a normalisation, whose channels are on axis 1."""

_AFFINE_OF_ROWS = {
    ("", "LayerNormalization"): (1, 2),
    (domain.DOMAIN, domain.ADD_LAYER_NORM): (2, 3),
    (domain.DOMAIN, domain.BIAS_ADD_LAYER_NORM): (3, 4),
}
"""Likewise with channels on the last axis."""


@dataclass(frozen=True)
class Writer:
    """A constant that is linear in a tensor's channels.

    Attributes:
        node: reads it.
        index: the node's input.
        axis: of the channels in the constant.
        channels: how many of them belong to the tensor, from the first.
    """

    node: ir.Node
    index: int
    axis: int
    channels: int


@dataclass(frozen=True)
class SmoothingSite:
    """A tensor that constants write and layers read.

    Attributes:
        tensor: the activation.
        writers: all constants that scale with it.
        readers: all layers that read it; nothing else does.
    """

    tensor: ir.Value
    writers: tuple[Writer, ...]
    readers: tuple[Layer, ...]


def find_sites(layers: Sequence[Layer]) -> tuple[list[SmoothingSite], list[Skipped]]:
    """Every site of a graph, in order, and the tensors that layers read and that are none, with reasons."""
    readers: dict[ir.Value, list[Layer]] = {}
    for layer in layers:
        readers.setdefault(layer.activation, []).append(layer)
    sites: list[SmoothingSite] = []
    skipped: list[Skipped] = []
    for tensor, behind in readers.items():
        found = _reason_against(tensor, behind) or _writers(tensor, behind[0])
        if isinstance(found, str):
            skipped.append(Skipped(site(behind[0].node), found))
        else:
            sites.append(SmoothingSite(tensor, found, tuple(behind)))
    return sites, skipped


def _reason_against(tensor: ir.Value, layers: Sequence[Layer]) -> str | None:
    nodes = {layer.node for layer in layers}
    if tensor.is_graph_output() or any(use.node not in nodes or use.idx != 0 for use in tensor.uses()):
        return "something else reads it too"
    if len({layer.spatial_axes for layer in layers}) > 1:
        return "layers that take its channels from different axes"
    return None


def _writers(tensor: ir.Value, layer: Layer) -> tuple[Writer, ...] | str:
    """The constants behind `tensor`, or why its channels, which `layer` tells the axis of, cannot be scaled."""
    node = tensor.producer()
    if node is None:
        return "an input of the graph"
    if node.outputs[0] is not tensor:
        return f"the second output of {node.op_type}"
    indices = (_AFFINE_OF_IMAGES if layer.spatial_axes else _AFFINE_OF_ROWS).get((node.domain, node.op_type))
    if indices is not None:
        return _affine_writers(node, indices, layer.channels)
    found = _image_writers(node, layer) if layer.spatial_axes else _row_writers(node)
    return found or f"behind {node.op_type}, which is not linear in any constant of its channels"


def _affine_writers(node: ir.Node, indices: tuple[int, int], channels: int) -> tuple[Writer, ...] | str:
    found = []
    for index in indices:
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is None:
            continue  # a LayerNormalization needs no shift
        tensor = constant_tensor(value)
        if tensor is None or tensor.shape.numpy() != (channels,):
            return "scale and shift of the normalisation are not constants with one number for each channel"
        found.append(Writer(node, index, 0, channels))
    return tuple(found)


def _image_writers(node: ir.Node, layer: Layer) -> tuple[Writer, ...] | str | None:
    """A convolution's outputs have weights and biases of their own; sums and changes of size keep channels apart."""
    if is_operator(node, Kind.CONV):
        return _convolution_writers(node, layer.channels)
    if is_operator(node, "Add"):
        return _operands_writers(node, node.inputs, layer)
    if is_operator(node, "Resize"):
        if not _keeps_channels(node):
            return "Resize of other axes than the picture's"
        return _operands_writers(node, node.inputs[:1], layer)
    return None


def _convolution_writers(conv: ir.Node, channels: int) -> tuple[Writer, ...] | str:
    indices = [index for index, value in enumerate(conv.inputs) if index and value is not None]
    if any(constant_tensor(conv.inputs[index]) is None for index in indices):
        return "a convolution whose weight or bias is not constant"
    return tuple(Writer(conv, index, 0, channels) for index in indices)


def _operands_writers(node: ir.Node, operands: Sequence[ir.Value | None], layer: Layer) -> tuple[Writer, ...] | str:
    """The constants behind all operands of a node that is linear in them and keeps channels apart."""
    writers: dict[Writer, None] = {}  # those of x + x once
    for value in operands:
        assert value is not None  # required by the operators
        shape = dimensions(value)
        if shape is None or len(shape) != layer.spatial_axes + 2 or shape[1] != layer.channels:
            return f"{node.op_type} of what may have other channels"
        if sole_consumer(value) is not node:
            return f"{node.op_type} of what something else reads too"
        found = _writers(value, layer)
        if isinstance(found, str):
            return found
        writers |= dict.fromkeys(found)
    return tuple(writers)


def _keeps_channels(resize: ir.Node) -> bool:
    """Whether it resizes spatial axes only, and fills nothing in."""
    attributes = resize.attributes
    if attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return False
    if "axes" in attributes:
        return all(axis > 1 for axis in attributes["axes"].as_ints())
    scales = constant(resize.inputs[2]) if len(resize.inputs) > 2 else None
    return scales is not None and scales.size > 1 and float(scales[1]) == 1


def _row_writers(node: ir.Node) -> tuple[Writer, ...] | str | None:
    if domain.is_fused(node, domain.MULTI_HEAD_ATTENTION) or is_operator(node, "Attention"):
        return _value_writers(node)
    if domain.is_fused(node, domain.BIAS_GEGLU):
        return _gate_writers(node)
    return None


def _value_writers(node: ir.Node) -> tuple[Writer, ...] | str:
    """Attention mixes rows; what becomes of a channel is what its value was."""
    value = node.inputs[2]
    if is_operator(node, "Attention") and not _has_equal_heads(node):
        return "attention of separate heads, or of fewer heads for its values"
    matmul = producer(value, "MatMul")
    if value is None or matmul is None or sole_consumer(value) is not node:
        return "attention to values that are no projection of their own"
    if sum(each is value for each in node.inputs) != 1:
        return "attention to values that are its queries or keys as well"
    weight = constant_tensor(matmul.inputs[1])
    if weight is None or len(weight.shape) != 2:
        return "attention to values whose projection is not constant"
    return (Writer(matmul, 1, 1, weight.shape.numpy()[1]),)


def _has_equal_heads(node: ir.Node) -> bool:
    query = node.attributes.get_int("q_num_heads", 0)
    return query != 0 and query == node.attributes.get_int("kv_num_heads", 0)


def _gate_writers(node: ir.Node) -> tuple[Writer, ...] | str:
    """The first half of what a gate reads is multiplied with a function of the other."""
    product, bias = node.inputs[:2]
    matmul = producer(product, "MatMul")
    if product is None or matmul is None or sole_consumer(product) is not node:
        return "a gate of something else than a projection of its own"
    weight, shift = constant_tensor(matmul.inputs[1]), constant_tensor(bias)
    if weight is None or shift is None or len(weight.shape) != 2:
        return "a gate whose projection is not constant"
    width = weight.shape.numpy()[1] // 2
    return (Writer(matmul, 1, 1, width), Writer(node, 1, 0, width))
