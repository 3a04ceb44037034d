"""Let images be channels-last from end to end, in ONNX Runtime's CUDA operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.lowering.lower_multi_head_attention import ORT_DOMAIN
from sdc.passes.lowering.nhwc_layout import CHANNELS_LAST, NhwcLayout
from sdc.passes.matching import constant, dimensions, producer, site

_MOST_CHANNELS_A_GROUP = 512


@dataclass(frozen=True)
class LowerImagesToNhwc(Pass):
    """Convolutions, norms and what stands between them work on [B, H, W, C].

    Before → after, with t(x) = Transpose(x, [0, 2, 3, 1]) and its inverse t⁻¹, all operators of com.microsoft::

        Conv(x, w, b)                                 →  t⁻¹(NhwcConv(t(x), t(w), b))
        sdc.GroupNormSilu(x, gamma, beta)             →  t⁻¹(GroupNorm(t(x), gamma, beta)), activation = 1
        GroupNormalization(x, gamma, beta)            →  the same, activation = 0
        (y, s) = sdc.AddGroupNormSilu(x, a, ...)      →  t⁻¹ of (y, s) = SkipGroupNorm(t(x), ..., t(a)), activation = 1
        (y, s) = sdc.AddGroupNorm(x, a, ...)          →  the same, activation = 0
        (y, j) = sdc.ConcatGroupNormSilu(x, s, ...)   →  j = Concat(t(x), t(s), axis=3), y = GroupNorm(j, ...)
        sdc.GroupNormSiluAdd(x, a, ...)               →  Add(GroupNorm(t(x), ...), t(a))
        Add(x, a), x and a images; Resize(x, scales)  →  the same on t(x)
        sdc.TokensFromImage(x)                        →  Reshape(t(x), [0, -1, C])
        sdc.ImageFromTokens(x, like)                  →  t⁻¹(Reshape(x, [0, H, W, -1]))

    A tensor that is made channels-last is read so; only where another operator reads it does t⁻¹ stay. Weights are
    turned when they are written. gamma and beta are float32, whatever the type of the image: the kernels want that.

    Preconditions:

    1. Images have rank 4 and a known element type, float32 or float16.
    2. Conv: a constant weight, quantised or not at all, one group, two spatial axes.
    3. Norms: gamma and beta are initialisers, the addend has the image's rank and its batch or a single row, which is
       then repeated; a group has an even number of channels, 512 at most.

    Not matched: what fails these; it stays as it is or is inlined. Quantised convolutions stay Conv.

    Source: ONNX Runtime, docs/ContribOperators.md; weights of NhwcConv are [M, kH, kW, C / group]. Sizes of groups:
    contrib_ops/cuda/diffusion/group_norm_impl.cu, and an H200, which refuses 3 channels a group.

    Attributes:
        group_multiple: what the channels of a group are a multiple of, for a kernel to exist.
    """

    group_multiple: int = 2
    name: ClassVar[str] = "lower-images-to-nhwc"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites; the details count them by the operator that they become."""
        layout = NhwcLayout(model.graph)
        skipped: list[Skipped] = []
        for node in list(model.graph):
            rule = _RULES.get((node.domain, node.op_type))
            if rule is None:
                continue
            if reason := _reason_against(node, self.group_multiple):
                if node.op_type not in ("Add", "Resize"):
                    skipped.append(Skipped(site(node), reason))
                continue
            rule(layout, node)
        if layout.counts:
            model.graph.opset_imports[ORT_DOMAIN] = 1
        return PassReport(self.name, layout.counts.total(), tuple(skipped), details=dict(sorted(layout.counts.items())))


def _reason_against(node: ir.Node, group_multiple: int) -> str | None:
    image = node.outputs[0] if node.op_type in ("Conv", domain.IMAGE_FROM_TOKENS) else node.inputs[0]
    shape = dimensions(image)
    if image is None or shape is None or len(shape) != 4:
        return f"x is {shape}, expected rank 4"
    if image.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"x is {image.dtype and image.dtype.name}, expected FLOAT or FLOAT16"
    if node.op_type == "Conv":
        return _reason_against_conv(node)
    if node.op_type in ("Add", domain.ADD_GROUP_NORM, domain.ADD_GROUP_NORM_SILU, domain.GROUP_NORM_SILU_ADD):
        addend = dimensions(node.inputs[1])
        if addend is None or len(addend) != 4 or addend[0] not in (1, shape[0]):
            return f"{addend} is added to {shape}, expected the same rank and batch, or a single row"
        if node.op_type == "Add" and any(constant(value) is not None for value in node.inputs):
            return "a constant is added"
    if node.op_type == "Resize":
        scales = constant(node.inputs[2]) if len(node.inputs) == 3 and node.inputs[1] is None else None
        return None if scales is not None and scales.size == 4 and "axes" not in node.attributes else "not by scales"
    return _reason_against_norm(node, shape[1], group_multiple) if "Norm" in node.op_type else None


def _reason_against_norm(norm: ir.Node, channels: int | str | None, multiple: int) -> str | None:
    if any(constant(value) is None for value in norm.inputs[-2:]):
        return "gamma or beta is computed, expected initialisers"
    if norm.op_type == domain.CONCAT_GROUP_NORM_SILU:  # x is the first half only
        channels = (dimensions(norm.outputs[0]) or (None, None))[1]
    if not isinstance(channels, int):
        return f"the norm is of {channels} channels, expected a number"
    in_group = channels // norm.attributes["num_groups"].as_int()
    if in_group % multiple or in_group > _MOST_CHANNELS_A_GROUP:
        return f"no kernel for groups of {in_group} channels"
    return None


def _reason_against_conv(conv: ir.Node) -> str | None:
    weight = conv.inputs[1]
    if weight is None or weight.const_value is None or weight.dtype != conv.outputs[0].dtype:
        return "the weight is computed or dequantised"
    groups = conv.attributes.get_int("group", 1)
    return None if groups == 1 else f"{groups} groups"


def _lower_conv(layout: NhwcLayout, conv: ir.Node) -> None:
    weight = conv.inputs[1]
    assert weight is not None
    attributes = {name: each for name, each in conv.attributes.items() if name != "auto_pad" or each.value != "NOTSET"}
    x = layout.last(conv.inputs[0], before=conv)
    operands = [x, layout.weight(weight), *conv.inputs[2:]]
    new = ir.node("NhwcConv", operands, attributes, domain=ORT_DOMAIN)
    layout.replace(conv, [new], list(new.outputs))


def _lower_norm(layout: NhwcLayout, node: ir.Node) -> None:
    new = layout.norm(node, layout.last(node.inputs[0], before=node))
    layout.replace(node, [new], list(new.outputs))


def _lower_add_norm(layout: NhwcLayout, node: ir.Node) -> None:
    image, addend = node.inputs[:2]
    assert addend is not None
    x = layout.last(image, before=node)
    if (dimensions(addend) or ())[2:] == (1, 1):
        skip, made = _row_of_channels(layout, addend, x, node)
    elif (dimensions(addend) or (0,))[0] != (dimensions(image) or (1,))[0]:
        made = _repeat_for_every_row(layout, layout.last(addend, before=node), x, f"{node.outputs[0].name}.rows")
        skip = made[-1].outputs[0]
    else:
        skip, made = layout.last(addend, before=node), []
    new = layout.norm(node, x, skip=skip)
    layout.replace(node, [*made, new], list(new.outputs))


def _row_of_channels(
    layout: NhwcLayout, addend: ir.Value, x: ir.Value, node: ir.Node
) -> tuple[ir.Value, list[ir.Node]]:
    """An image of one pixel, such as a time embedding's projection, as [B, C], and the nodes that make it."""
    unsqueeze = producer(addend, "Unsqueeze")
    flat = None if unsqueeze is None else unsqueeze.inputs[0]
    row = flat if flat is not None and len(dimensions(flat) or ()) == 2 else addend
    name, made, result = f"{node.outputs[0].name}.rows", [], row
    if (dimensions(addend) or (0,))[0] != (dimensions(node.inputs[0]) or (1,))[0]:
        made += _repeat_for_every_row(layout, row, x, name)
        result = made[-1].outputs[0]
    if row is addend:
        made.append(ir.node("Reshape", [result, layout.constant(f"{name}.shape", np.array([0, -1], np.int64))]))
        result = made[-1].outputs[0]
        result.name, result.type = f"{name}.flat", addend.type
    return result, made


def _repeat_for_every_row(layout: NhwcLayout, row: ir.Value, x: ir.Value, name: str) -> list[ir.Node]:
    """[1, ...] → [B, ...]: the kernel does not broadcast over the batch. The last node gives it."""
    batch = ir.node("Shape", [x], {"start": 0, "end": 1})
    ones = layout.constant(f"{name}.ones", np.ones(len(dimensions(row) or ()) - 1, np.int64))
    shape = ir.node("Concat", [batch.outputs[0], ones], {"axis": 0})
    repeated = ir.node("Expand", [row, shape.outputs[0]])
    repeated.outputs[0].name, repeated.outputs[0].type = name, row.type
    return [batch, shape, repeated]


def _lower_concat_norm(layout: NhwcLayout, node: ir.Node) -> None:
    joined = ir.node("Concat", [layout.last(value, before=node) for value in node.inputs[:2]], {"axis": 3})
    new = layout.norm(node, joined.outputs[0])
    layout.replace(node, [joined, new], [new.outputs[0], joined.outputs[0]])


def _lower_norm_add(layout: NhwcLayout, node: ir.Node) -> None:
    norm = layout.norm(node, layout.last(node.inputs[0], before=node))
    new = ir.node("Add", [norm.outputs[0], layout.last(node.inputs[1], before=node)])
    norm.outputs[0].type = node.outputs[0].type
    layout.replace(node, [norm, new], list(new.outputs))


def _lower_add(layout: NhwcLayout, node: ir.Node) -> None:
    new = ir.node("Add", [layout.last(value, before=node) for value in node.inputs])
    layout.replace(node, [new], list(new.outputs))


def _lower_resize(layout: NhwcLayout, node: ir.Node) -> None:
    scales = constant(node.inputs[2])
    assert scales is not None
    turned = layout.constant(f"{node.outputs[0].name}.scales", scales[CHANNELS_LAST])
    new = ir.node("Resize", [layout.last(node.inputs[0], before=node), None, turned], node.attributes)
    layout.replace(node, [new], list(new.outputs))


def _lower_tokens(layout: NhwcLayout, node: ir.Node) -> None:
    shape = np.array([0, -1, node.attributes["channels"].as_int()], np.int64)
    operands = [layout.last(node.inputs[0], before=node), layout.constant(f"{node.outputs[0].name}.shape", shape)]
    new = ir.node("Reshape", operands, name=node.name)
    ir.convenience.replace_nodes_and_values(layout.graph, node, [node], [new], node.outputs, new.outputs)
    layout.counts.update(["Reshape"])


def _lower_image(layout: NhwcLayout, node: ir.Node) -> None:
    like = layout.last(node.inputs[1], before=node)
    size = ir.node("Shape", [like], {"start": 1, "end": 3})
    name = node.outputs[0].name
    first, rest = (layout.constant(f"{name}.{key}", np.array([n], np.int64)) for key, n in (("batch", 0), ("rest", -1)))
    shape = ir.node("Concat", [first, size.outputs[0], rest], {"axis": 0})
    for each, length in ((size, 2), (shape, 4)):
        each.outputs[0].type, each.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([length])
    new = ir.node("Reshape", [node.inputs[0], shape.outputs[0]])
    layout.replace(node, [size, shape, new], list(new.outputs))


_RULES: dict[tuple[str, str], Callable[[NhwcLayout, ir.Node], None]] = {
    ("", "Conv"): _lower_conv,
    ("", "Add"): _lower_add,
    ("", "Resize"): _lower_resize,
    ("", "GroupNormalization"): _lower_norm,
    (domain.DOMAIN, domain.GROUP_NORM_SILU): _lower_norm,
    (domain.DOMAIN, domain.ADD_GROUP_NORM): _lower_add_norm,
    (domain.DOMAIN, domain.ADD_GROUP_NORM_SILU): _lower_add_norm,
    (domain.DOMAIN, domain.CONCAT_GROUP_NORM_SILU): _lower_concat_norm,
    (domain.DOMAIN, domain.GROUP_NORM_SILU_ADD): _lower_norm_add,
    (domain.DOMAIN, domain.TOKENS_FROM_IMAGE): _lower_tokens,
    (domain.DOMAIN, domain.IMAGE_FROM_TOKENS): _lower_image,
}
