from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from contrib_reference import check_schemas, is_valid_standard, run_reference
from equality import FP32, operators, run_model
from exported_graphs import INPUTS, feed, load_graph
from small_denoiser import make_model
from small_graphs import ATTENTION, RESNET, feed_attention, feed_resnet, make_attention, make_resnet
from test_fuse_attention import SELF, masked
from test_fuse_group_norm_neighbours import JOIN_FEEDS, LITERAL_FEEDS, make_join, make_literal
from transformer_graph import FEEDS, TRANSFORMER, make_transformer

from sdc.passes.base import run_passes
from sdc.passes.lowering.lower_images_to_nhwc import LowerImagesToNhwc
from sdc.passes.lowering.lower_multi_head_attention import LowerMultiHeadAttention
from sdc.passes.lowering.lower_to_contrib import LowerToContrib
from sdc.passes.lowering.narrow_inputs import NarrowInputs
from sdc.passes.pipeline import ORT_CUDA, canonical_passes, fusion_passes, lowering_passes, precision_passes
from sdc.passes.precision.cast_fp16 import CastFp16

ANY_WIDTH = LowerToContrib(geglu_widths=frozenset({14}), bias_add_widths=frozenset({10}))
ANY_GROUP = LowerImagesToNhwc(group_multiple=1)
OF_ANY_SIZE = {LowerToContrib: ANY_WIDTH, LowerImagesToNhwc: ANY_GROUP}
WIDE = tuple(OF_ANY_SIZE.get(type(each), each) for each in lowering_passes(ORT_CUDA))


def fused(model: ir.Model) -> ir.Model:
    run_passes([*canonical_passes(), *fusion_passes()], model)
    return model


def largest_error(model: ir.Model, expected: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> float:
    found = run_reference(model, feeds)
    assert all(found[name].dtype == value.dtype for name, value in expected.items())
    return max(float(np.abs(found[name] - value).max() / np.abs(value).max()) for name, value in expected.items())


SHORTCUT = RESNET.replace(
    "skip = Add (x, second)",
    """across = Conv <pads = [1, 1, 1, 1]> (x, w3, b3)
    skip = Add (across, second)""",
).replace(
    "y = Add (skip, third)",
    """left = Conv <pads = [1, 1, 1, 1]> (silu2, w1, b2)
    y = Add (left, third)""",
)
"""Convolutions on both sides of two sums, one of which is normalised."""

GRAPHS = {
    "resnet": (make_resnet, [feed_resnet(), feed_resnet(scale=0.01)], {"NhwcConv": 3, "SkipGroupNorm": 2}),
    "transformer": (
        make_transformer,
        FEEDS,
        {"NhwcConv": 2, "SkipGroupNorm": 1, "SkipLayerNormalization": 1, "BiasSplitGelu": 1, "BiasAdd": 1},
    ),
    "join": (make_join, JOIN_FEEDS, {"NhwcConv": 1, "GroupNorm": 1}),
    "literal": (make_literal, LITERAL_FEEDS, {"NhwcConv": 1, "GroupNorm": 1}),
    "attention": (make_attention, [feed_attention()], {"MultiHeadAttention": 1}),
    "causal": (
        lambda: make_attention(SELF.replace("Attention (", "Attention <is_causal = 1> (")),
        [feed_attention()],
        {"MultiHeadAttention": 1},
    ),
}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", GRAPHS)
def test_contributed_operators_are_valid_and_compute_the_same(name: str, half: bool) -> None:
    make, feeds, counts = GRAPHS[name]
    model = make()
    expected = [run_model(model, each) for each in feeds]
    fused(model)
    run_passes([*([CastFp16()] if half else []), *WIDE], model)
    contributed = Counter(node.op_type for node in model.graph if node.domain == "com.microsoft")
    assert contributed == counts
    assert check_schemas(model) == sum(counts.values())
    assert is_valid_standard(model)
    for each, outputs in zip(feeds, expected, strict=True):
        # Small inputs leave little of float16's precision behind a norm.
        assert largest_error(model, outputs, each) <= (2e-2 if half else FP32)


@pytest.mark.parametrize("flat", [True, False], ids=["row of channels", "image of one pixel"])
def test_time_embedding_of_one_row_is_repeated(flat: bool) -> None:
    text = RESNET.replace("float[B, 6] time", "float[1, 6] time" if flat else "float[1, 6, 1, 1] time")
    model = make_resnet(text if flat else text.replace("shift = Unsqueeze (time, planes)", "shift = Identity (time)"))
    feeds = feed_resnet()
    feeds["time"] = feeds["time"][:1] if flat else feeds["time"][:1, :, None, None]
    expected = run_model(model, feeds)
    fused(model)
    run_passes(WIDE, model)
    assert operators(model).count("com.microsoft.SkipGroupNorm") == 2
    assert operators(model).count("Expand") == 1
    check_schemas(model)
    assert largest_error(model, expected, feeds) <= FP32


@pytest.mark.parametrize("component", INPUTS)
def test_small_models_networks_compute_the_same(component: str) -> None:
    model = load_graph(component)
    feeds = feed(component, batch=2, height=4, width=8)
    expected = run_model(model, feeds)
    run_passes([*canonical_passes(), *fusion_passes(component), *lowering_passes(ORT_CUDA)], model)
    assert check_schemas(model) > 0
    assert is_valid_standard(model)
    assert largest_error(model, expected, feeds) <= FP32


@pytest.mark.parametrize("component", INPUTS)
def test_half_networks_are_valid(component: str) -> None:
    model = load_graph(component)
    run_passes(
        [*canonical_passes(), *fusion_passes(component), *precision_passes("fp16"), *lowering_passes(ORT_CUDA)], model
    )
    assert check_schemas(model) > 0
    assert is_valid_standard(model)


@pytest.mark.parametrize(("component", "transposes"), [("unet", 2), ("vae_decoder", 2), ("vae_encoder", 2)])
def test_images_are_turned_at_the_border_alone(component: str, transposes: int) -> None:
    model = load_graph(component)
    run_passes([*canonical_passes(), *fusion_passes(component), *WIDE], model)
    assert operators(model).count("Transpose") == transposes
    assert "Conv" not in operators(model)


def test_omitted_outputs_stay_omitted() -> None:
    model = fused(make_transformer())
    run_passes(WIDE, model)
    (norm,) = (node for node in model.graph if node.op_type == "SkipLayerNormalization")
    assert [value.name for value in norm.outputs] == ["normed1", "", "", "sum1"]


def test_groups_without_a_kernel_stay() -> None:
    make, feeds, counts = GRAPHS["join"]
    model = make()
    expected = run_model(model, feeds[0])
    report = LowerImagesToNhwc().run(fused(model))
    assert [each.reason for each in report.skipped] == ["no kernel for groups of 3 channels"]
    assert report.details == {"NhwcConv": counts["NhwcConv"]}
    run_passes(lowering_passes(ORT_CUDA), model)
    assert largest_error(model, expected, feeds[0]) <= FP32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace(ANY_WIDTH, geglu_widths=frozenset({2560})), "no kernel for 14 channels"),
        (replace(ANY_WIDTH, bias_add_widths=frozenset({320})), "no kernel for 10 channels"),
    ],
)
def test_width_without_a_kernel_stays(change: LowerToContrib, reason: str) -> None:
    report = change.run(fused(make_transformer()))
    assert report.matched == 2
    assert [each.reason for each in report.skipped] == [reason]


def test_approximated_gelu_stays() -> None:
    model = fused(make_transformer(TRANSFORMER.replace("Gelu (gate)", 'Gelu <approximate = "tanh"> (gate)')))
    assert ["approximated" in each.reason for each in ANY_WIDTH.run(model).skipped] == [True]


def test_norm_of_another_rank_stays() -> None:
    model = fused(make_transformer())
    next(value for value in model.graph.all_nodes() if value.op_type == "BiasAddLayerNorm").inputs[0].shape = None  # type: ignore[union-attr]
    assert ["expected rank 3" in each.reason for each in ANY_WIDTH.run(model).skipped] == [True]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("rank", "expected rank 4"),
        ("type", "expected FLOAT or FLOAT16"),
        ("weight", "computed or dequantised"),
        ("groups", "2 groups"),
        ("batch", "the same rank and batch"),
        ("gamma", "gamma or beta is computed"),
    ],
)
def test_image_operator_that_stays_says_why(kind: str, reason: str) -> None:
    model = fused(make_transformer())
    conv, norm = (next(node for node in model.graph if node.op_type == each) for each in ("Conv", "AddGroupNorm"))
    image, addend = norm.inputs[0], norm.inputs[1]
    assert image is not None
    assert addend is not None
    if kind == "rank":
        image.shape = None
    if kind == "type":
        image.type = ir.TensorType(ir.DataType.BFLOAT16)
    if kind in ("weight", "gamma"):
        node, index = (conv, 1) if kind == "weight" else (norm, 2)
        computed = ir.node("Neg", [node.inputs[index]])
        model.graph.insert_before(node, computed)
        node.replace_input_with(index, computed.outputs[0])
    if kind == "groups":
        conv.attributes["group"] = ir.AttrInt64("group", 2)
    if kind == "batch":
        addend.shape = ir.Shape([2, 6, "H", "W"])
    report = LowerImagesToNhwc().run(model)
    assert [each.reason for each in report.skipped if reason in each.reason] != []
    left = {"Conv", "AddGroupNorm"} & {node.op_type for node in model.graph}
    assert left == ({"Conv"} if kind in ("weight", "groups") else {"AddGroupNorm"})


def test_attention_with_a_mask_stays() -> None:
    model = fused(make_attention(masked("bool")))
    attention = next(each for each in lowering_passes(ORT_CUDA) if isinstance(each, LowerMultiHeadAttention))
    assert [each.reason for each in attention.run(model).skipped] == ["masked"]


@pytest.mark.parametrize("known", [True, False], ids=["other number", "unknown"])
def test_causal_attention_with_other_keys_than_queries_stays(known: bool) -> None:
    text = ATTENTION if known else SELF
    model = fused(make_attention(text.replace("Attention (", "Attention <is_causal = 1> (")))
    if not known:
        (node,) = (each for each in model.graph if each.op_type == "MultiHeadAttention")
        assert node.inputs[1] is not None
        node.inputs[1].shape = None
    report = LowerMultiHeadAttention(causal=True).run(model)
    assert report.matched == 0
    assert ["as many keys as queries" in each.reason for each in report.skipped] == [True]


def biases(model: ir.Model) -> dict[str, int]:
    """How many nodes of each kind add a bias of their own."""
    has_one = {"NhwcConv": 2, "SkipGroupNorm": 4}
    return Counter(node.op_type for node in model.graph if len(node.inputs) > has_one.get(node.op_type, 99))


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("text", "left"),
    [(RESNET, {"SkipGroupNorm": 2, "NhwcConv": 1}), (SHORTCUT, {"SkipGroupNorm": 2, "NhwcConv": 1})],
    ids=["resnet", "shortcuts"],
)
def test_sums_take_the_biases_of_convolutions(text: str, left: dict[str, int], half: bool) -> None:
    """Of the last sum's operands one is no convolution, or one convolution keeps the bias of both."""
    model = make_resnet(text)
    feeds = feed_resnet()
    expected = run_model(model, feeds)
    fused(model)
    run_passes([*([CastFp16()] if half else []), *WIDE], model)
    assert biases(model) == left
    check_schemas(model)
    assert largest_error(model, expected, feeds) <= (2e-2 if half else FP32)


def test_bias_of_an_image_that_others_read_stays() -> None:
    model = make_resnet(RESNET.replace("y = Add (skip, third)", "sum = Add (skip, third)\n y = Add (sum, second)"))
    feeds = feed_resnet()
    expected = run_model(model, feeds)
    run_passes(WIDE, fused(model))
    assert biases(model) == {"SkipGroupNorm": 1, "NhwcConv": 2}
    assert largest_error(model, expected, feeds) <= FP32


def test_inputs_that_are_only_read_in_float16_are_taken_so_but_images() -> None:
    model = fused(make_resnet())
    run_passes([CastFp16(), *WIDE], model)
    assert {value.name: value.dtype for value in model.graph.inputs} == {
        "x": ir.DataType.FLOAT,
        "time": ir.DataType.FLOAT16,
    }
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT]
    assert operators(model).count("Cast") == 2


HALF_READER = """
<ir_version: 10, opset_import: ["": 23]>
readers (float[2] x, float[2] t) => (float16[2] a, float16[2] b, float[2] c)
<float16[2] half_x, float16[2] half_t, float[2] size>
{
    half_x = Cast <to = 10> (x)
    half_t = Cast <to = 10> (t)
    a = Neg (half_x)
    b = Neg (half_t)
    size = Abs (x)
    c = Cast <to = 1> (size)
}
"""


def test_an_input_that_is_read_in_float32_too_stays() -> None:
    model = make_model(HALF_READER, {})
    assert NarrowInputs().run(model).matched == 1
    assert [value.dtype for value in model.graph.inputs] == [ir.DataType.FLOAT, ir.DataType.FLOAT16]
    assert operators(model) == ["Cast", "Neg", "Neg", "Abs", "Cast"]


def test_a_convolution_that_is_added_to_itself_keeps_its_bias() -> None:
    model = make_resnet(RESNET.replace("y = Add (skip, third)", "y = Add (third, third)"))
    feeds = feed_resnet()
    expected = run_model(model, feeds)
    run_passes(WIDE, fused(model))
    assert biases(model)["NhwcConv"] == 1
    assert largest_error(model, expected, feeds) <= FP32
