"""Each pass that arranges a graph for one backend, broken in the ways in which it could have been."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import pytest
from broken import (
    Broken,
    Case,
    attribute,
    check_noticed,
    entry,
    initializers,
    names,
    nodes,
    operand,
    operand_values,
    patched,
    swapped,
    without_operand,
)
from equality import FP32, Feeds, run_model
from small_denoiser import make_model
from small_graphs import ATTENTION, feed_resnet, make_attention, make_resnet
from test_broken_rewrites import GRAPHS, LAYER_NORM
from test_fuse_attention import FEEDS as ATTENTION_FEEDS
from test_fuse_attention import masked
from test_fuse_group_norm_neighbours import JOIN_FEEDS, make_join
from test_guard_quantised_bias import make_block, make_input
from test_lower_onnxruntime_cuda import HALF_READER, SHORTCUT, WIDE, largest_error
from test_lower_quantised_conv import KERNELS, make_conv
from test_lower_quantised_conv import make_feeds as make_conv_feeds
from test_lowering import DECOMPOSE
from test_merge_projections import FEEDS as SELF_FEEDS
from test_merge_projections import make_self
from test_quantised_results import STEPS
from test_quantised_results import make_conv as make_conv_to_bytes
from test_quantised_results import make_inputs as make_images
from test_shift_qdq_to_uint8 import PAIR
from test_split_geglu import make_gate, make_quantised
from test_widen_fp16 import FEEDS as WIDEN_FEEDS
from test_widen_fp16 import ROUNDED, make_half_matmul
from transformer_graph import FEEDS, make_transformer

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, run_passes
from sdc.passes.lowering.guard_quantised_bias import GuardQuantisedBias
from sdc.passes.lowering.lower_bias_sums import LowerBiasSums
from sdc.passes.lowering.lower_conv_to_bytes import LowerConvToBytes
from sdc.passes.lowering.lower_group_norm import LowerGroupNorm
from sdc.passes.lowering.lower_images_to_nhwc import LowerImagesToNhwc
from sdc.passes.lowering.lower_multi_head_attention import LowerMultiHeadAttention
from sdc.passes.lowering.lower_quantised_conv import LowerQuantisedConv
from sdc.passes.lowering.lower_to_contrib import LowerToContrib
from sdc.passes.lowering.merge_projections import MergeProjections
from sdc.passes.lowering.move_conv_bias import MoveConvBias
from sdc.passes.lowering.narrow_inputs import NarrowInputs
from sdc.passes.lowering.shift_qdq_to_uint8 import ShiftQdqToUint8
from sdc.passes.lowering.split_geglu import SplitGeGlu
from sdc.passes.lowering.widen_fp16 import WidenFp16
from sdc.passes.pipeline import canonical_passes, fusion_passes
from sdc.passes.simplify.cancel_no_ops import CancelNoOps

SCALED = ATTENTION.replace("Attention (", "Attention <scale = 0.7> (")
CAUSAL = ATTENTION.replace("MatMul (context, wk)", "MatMul (x, wq)").replace("MatMul (context, wv)", "MatMul (x, wq)")
CAUSAL = CAUSAL.replace("Attention (", "Attention <scale = 0.7, is_causal = 1> (")


def fused(make: Callable[[], ir.Model]) -> Callable[[], ir.Model]:
    def make_fused() -> ir.Model:
        model = make()
        run_passes([*canonical_passes(), *fusion_passes()], model)
        return model

    return make_fused


def contrib_proven(
    passes: Sequence[Pass], model: ir.Model, feeds: Sequence[Feeds], *, tolerance: float = FP32
) -> list[PassReport]:
    """As `apply_proven`, for operators that only CUDA has kernels for: against the reference in NumPy."""
    expected = [run_model(model, each) for each in feeds]
    reports = [each.run(model) for each in passes]
    error = max(largest_error(model, wanted, dict(each)) for wanted, each in zip(expected, feeds, strict=True))
    assert error <= tolerance, f"not equal: the relative error is {error:.1e}"
    return reports


def read_value_as_gate(gelu: ir.Node) -> None:
    """The activation falls on the other half."""
    (product,) = gelu.outputs[0].consumers()
    value, gate = product.inputs[0], gelu.inputs[0]
    gelu.replace_input_with(0, value)
    product.replace_input_with(0, gate)


def keys_for_values(softmax: ir.Node) -> None:
    """What a decomposed attention multiplies changes places."""
    graph = softmax.graph
    assert graph is not None
    (total,) = softmax.outputs[0].consumers()
    (transpose,) = (node for node in graph if node.op_type == "Transpose" and node.inputs[0].name == "k")
    key, value = transpose.inputs[0], total.inputs[1]
    transpose.replace_input_with(0, value)
    total.replace_input_with(1, key)


def first_columns(cut: Callable[..., ir.Value]) -> Callable[..., ir.Value]:
    """Scales are those of the first half, whichever half is cut."""

    def cut_first(graph: ir.Graph, value: ir.Value, begin: int, end: int, name: str) -> ir.Value:
        if value.shape is not None and len(value.shape) == 1:
            begin, end = 0, end - begin
        return cut(graph, value, begin, end, name)

    return cut_first


def lowers(make: Callable[[], ir.Model], feeds: Sequence[Feeds], kinds: dict[str, Broken], *passes: Pass) -> Case:
    return Case(make, feeds, passes, kinds)


def lowers_to_cuda(
    make: Callable[[], ir.Model], feeds: Sequence[Feeds], kinds: dict[str, Broken], wanted: type[Pass]
) -> Case:
    return Case(fused(make), feeds, WIDE, kinds, wanted, prove=contrib_proven)


def casts_alone(consumers: Callable[[ir.Value], list[ir.Node]]) -> Callable[[ir.Value], list[ir.Node]]:
    """All other readers are overlooked."""
    return lambda value: [node for node in consumers(value) if node.op_type == "Cast"]


def first_of_all(constant: Callable[..., np.ndarray | None]) -> Callable[..., np.ndarray | None]:
    """Every constant but the first is read as zero."""
    seen: list[ir.Value | None] = []

    def read(value: ir.Value | None) -> np.ndarray | None:
        array = constant(value)
        if array is None:
            return None
        if value not in seen:
            seen.append(value)
        return array if value is seen[0] else array * 0

    return read


SMALL_RESNET = [feed_resnet(), feed_resnet(scale=0.01)]
ATTENTION_KINDS = {
    "keys and values swapped": swapped("MultiHeadAttention", 1, 2),
    "scale forgotten": attribute("MultiHeadAttention", "scale", None),
    "other heads": attribute("MultiHeadAttention", "num_heads", 5),
}
NORM_KINDS = {
    "epsilon dropped": attribute("SkipGroupNorm", "epsilon", 0.0),
    "groups merged": attribute("SkipGroupNorm", "groups", 1),
    "gamma and beta swapped": swapped("SkipGroupNorm", 1, 2),
    "skip forgotten": operand("SkipGroupNorm", 3, 0),
}

CASES = {
    "openvino: split-geglu": lowers(
        make_gate,
        FEEDS,
        {
            "halves swapped": nodes("Gelu", read_value_as_gate),
            "tanh": attribute("Gelu", "approximate", "tanh"),
            "biases of the first half": patched("lowering.split_geglu:add_columns", first_columns),
        },
        SplitGeGlu(),
    ),
    "openvino: split-geglu, quantised": lowers(
        make_quantised,
        FEEDS[:2],
        {"scales of the first half": patched("lowering.weight_slices:add_columns", first_columns)},
        SplitGeGlu(),
    ),
    "openvino: guard-quantised-bias": lowers(
        lambda: make_block(None),
        [{"x": make_input()}],
        {"bias that counts": entry("lowering.guard_quantised_bias:_SMALLEST", ir.DataType.FLOAT, 1e-2)},
        GuardQuantisedBias(),
    ),
    "onnxruntime: merge-projections": lowers(
        make_self,
        SELF_FEEDS,
        {
            "weights in another order": patched(
                "lowering.merge_projections:_joined",
                lambda join: lambda graph, weights, shape: join(graph, weights[::-1], shape),
            ),
        },
        MergeProjections(),
    ),
    "onnxruntime: widen-fp16": Case(
        make_half_matmul,
        WIDEN_FEEDS,
        (WidenFp16(), CancelNoOps()),
        {
            "small constants are others": patched(
                "lowering.widen_fp16:_widened",
                lambda widened: lambda tensor: ir.tensor(widened(tensor).numpy() + np.float32(4), name=tensor.name),
            ),
            "weights of another matrix": initializers(lambda value: value.dtype == ir.DataType.FLOAT16, np.negative),
            "bias forgotten": operand("Add", 1, 0),
        },
        WidenFp16,
        tolerance=ROUNDED,
    ),
    "onnxruntime: lower-multi-head-attention": lowers(
        fused(lambda: make_attention(SCALED)), ATTENTION_FEEDS, ATTENTION_KINDS, LowerMultiHeadAttention()
    ),
    "onnxruntime: lower-bias-sums": lowers(
        fused(lambda: make_transformer(LAYER_NORM)),
        FEEDS,
        {
            "bias forgotten": operand("Sum", 1, 0),
            "residual forgotten": operand("Sum", 2, 0),
            "epsilon dropped": attribute("LayerNormalization", "epsilon", 0.0),
            "gamma and beta swapped": swapped("LayerNormalization", 1, 2),
        },
        LowerBiasSums(),
    ),
    "onnxruntime: lower-group-norm": lowers(
        make_resnet,
        SMALL_RESNET,
        {
            "epsilon dropped": attribute("InstanceNormalization", "epsilon", 0.0),
            "epsilon of the affine map": attribute("BatchNormalization", "epsilon", 1e-3),
            "gamma and beta swapped": swapped("BatchNormalization", 1, 2),
            "gamma forgotten": operand("BatchNormalization", 1, 4),
            "beta forgotten": operand("BatchNormalization", 2, 3),
        },
        LowerGroupNorm(),
    ),
    "onnxruntime: shift-qdq-to-uint8": lowers(
        lambda: make_model(PAIR.format(zero=0), {}),
        [{"x": (np.arange(35, dtype=np.float32) - 17).reshape(5, 7) * 3}],
        {"another offset": patched("lowering.shift_qdq_to_uint8:_OFFSET", lambda offset: offset - 1)},
        ShiftQdqToUint8(),
    ),
    "onnxruntime: lower-quantised-conv": lowers(
        lambda: make_conv(*KERNELS["uneven"]),
        make_conv_feeds(),
        {
            "border of another number": without_operand("Pad", 2),
            "padded at the other end": operand_values("Pad", 1, lambda pads: np.roll(pads, 4)),
            "steps forgotten": operand_values("Slice", 4, np.ones_like),
            "taps in another order": swapped("Concat", 0, 1),
            "bias forgotten": without_operand("MatMulIntegerToFloat", 6),
            "no zero point": nodes("MatMulIntegerToFloat", lambda node: node.replace_input_with(4, None)),
        },
        LowerQuantisedConv(),
    ),
    "tensorrt: decompose-attention": lowers(
        lambda: make_attention(masked("float").replace("Attention (", "Attention <scale = 0.7> (")),
        ATTENTION_FEEDS[:1],
        {
            "scale forgotten": operand_values("Mul", 1, np.ones_like),
            "softmax over the queries": attribute("Softmax", "axis", -2),
            "mask forgotten": operand_values("Add", 1, np.zeros_like),
            "keys and values swapped": nodes("Softmax", keys_for_values),
        },
        DECOMPOSE,
    ),
    "tensorrt: decompose-attention, condition": lowers(
        lambda: make_attention(masked("bool")),
        ATTENTION_FEEDS[:1],
        {"inverted": swapped("Where", 1, 2), "hidden by too little": operand_values("Where", 2, np.zeros_like)},
        DECOMPOSE,
    ),
    "onnxruntime: lower-conv-to-bytes": Case(
        lambda: make_conv_to_bytes("pads = [1, 1, 1, 1]"),
        make_images(),
        (LowerConvToBytes(),),
        {
            "bias of another channel": operand_values("QLinearConv", 8, lambda bias: bias[::-1].copy()),
            "scales of one step": operand_values("QLinearConv", 4, lambda scales: scales * STEPS),
            "another border": attribute("QLinearConv", "pads", [0, 0, 2, 2]),
            "zero point of the activations lost": operand("QLinearConv", 2, 7),
        },
        tolerance=0.009,  # a step of the widest channel: the sum and the bias are rounded in another order
    ),
    "cuda: lower-multi-head-attention": lowers_to_cuda(
        lambda: make_attention(CAUSAL),
        ATTENTION_FEEDS,
        {
            "scale forgotten": attribute("MultiHeadAttention", "scale", None),
            "causal lost": attribute("MultiHeadAttention", "unidirectional", None),
        },
        LowerMultiHeadAttention,
    ),
    "cuda: lower-to-contrib": lowers_to_cuda(
        lambda: make_transformer(LAYER_NORM),
        FEEDS,
        {
            "epsilon dropped": attribute("SkipLayerNormalization", "epsilon", 0.0),
            "gamma and beta swapped": swapped("SkipLayerNormalization", 2, 3),
            "bias and beta swapped": swapped("SkipLayerNormalization", 3, 4),
            "residual forgotten": operand("BiasAdd", 2, 0),
        },
        LowerToContrib,
    ),
    "cuda: lower-to-contrib, QuickGelu": lowers_to_cuda(
        GRAPHS[domain.QUICK_GELU][0],
        GRAPHS[domain.QUICK_GELU][1],
        {"Silu": attribute("QuickGelu", "alpha", 1.0)},
        LowerToContrib,
    ),
    "cuda: lower-images-to-nhwc": lowers_to_cuda(
        make_resnet,
        SMALL_RESNET,
        NORM_KINDS | {"no Silu": attribute("SkipGroupNorm", "activation", 0)},
        LowerImagesToNhwc,
    ),
    "cuda: lower-images-to-nhwc, transformer": lowers_to_cuda(
        make_transformer, FEEDS, NORM_KINDS | {"Silu": attribute("SkipGroupNorm", "activation", 1)}, LowerImagesToNhwc
    ),
    "cuda: lower-images-to-nhwc, join": lowers_to_cuda(
        make_join, JOIN_FEEDS, {"other order": swapped("Concat", 0, 1)}, LowerImagesToNhwc
    ),
    "cuda: narrow-inputs": Case(
        lambda: make_model(HALF_READER, {}),
        [{"x": np.array([0.1, 1000.2], np.float32), "t": np.array([0.3, 7], np.float32)}],
        (NarrowInputs(),),
        {"one that others read": patched("lowering.narrow_inputs:consumers", casts_alone)},
        prove=contrib_proven,
    ),
    "cuda: move-conv-bias": lowers_to_cuda(
        make_resnet,
        SMALL_RESNET,
        {
            "lost": without_operand("SkipGroupNorm", 4),
            "of another": operand_values("SkipGroupNorm", 4, lambda bias: bias[::-1].copy()),
        },
        MoveConvBias,
    ),
    "cuda: move-conv-bias, two": lowers_to_cuda(
        lambda: make_resnet(SHORTCUT),
        SMALL_RESNET,
        {"one of them lost": patched("lowering.move_conv_bias:constant", first_of_all)},
        MoveConvBias,
    ),
}


@pytest.mark.parametrize(("name", "kind"), names(CASES))
def test_broken_lowering_is_noticed(name: str, kind: str) -> None:
    check_noticed(CASES[name], kind)
