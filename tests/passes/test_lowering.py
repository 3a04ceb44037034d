from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest
from equality import apply_proven, make_model, operators, relative_error, run_model
from small_graphs import ATTENTION, feed_attention, feed_resnet, make_attention, make_resnet, normal
from test_fuse_attention import FEEDS, masked

from sdc.engines.errors import InputError, PassError
from sdc.passes.base import run_passes
from sdc.passes.lowering.decompose_attention import DecomposeAttention
from sdc.passes.lowering.lower_group_norm import LowerGroupNorm
from sdc.passes.lowering.lower_multi_head_attention import LowerMultiHeadAttention
from sdc.passes.pipeline import BACKENDS, canonical_passes, fusion_passes, lowering_passes, precision_passes
from sdc.passes.precision.cast_fp16 import CastFp16
from sdc.passes.simplify.check_operators import CheckOperators
from sdc.passes.simplify.inline_functions import InlineFunctions

DECOMPOSE = DecomposeAttention(frozenset({ir.DataType.FLOAT16}), frozenset({16, 40}))
RAISE_AND_FUSE = (*canonical_passes(), *fusion_passes())


def fused(model: ir.Model) -> ir.Model:
    for each in RAISE_AND_FUSE:
        each.run(model)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
def test_lowered_graphs_are_equal_and_have_no_functions(backend: str) -> None:
    for model, feeds in ((make_resnet(), feed_resnet()), (make_attention(), feed_attention())):
        fused(model)
        apply_proven(lowering_passes(backend), model, [feeds])
        assert not model.functions
        assert set(model.graph.opset_imports) <= {"", "com.microsoft"}


def test_plain_graph_comes_back_from_tensorrts_lowering() -> None:
    model = make_resnet()
    before = Counter(operators(model))
    fused(model)
    for each in lowering_passes("tensorrt_rtx"):
        each.run(model)
    assert Counter(operators(model)) == before


def test_head_split_has_a_constant_shape_after_lowering() -> None:
    model = fused(make_attention())
    for each in lowering_passes("tensorrt_rtx"):
        each.run(model)
    shapes = [node.inputs[1].const_value for node in model.graph if node.op_type == "Reshape"]  # type: ignore[union-attr]
    assert [shape.numpy().tolist() for shape in shapes if shape is not None] == [[0, 0, 3, -1]] * 3 + [[0, 0, -1]]


def test_unmasked_attention_becomes_onnxruntimes_own() -> None:
    model = fused(make_attention())
    (report,) = apply_proven(LowerMultiHeadAttention(), model, FEEDS)
    assert report.matched == 1
    assert operators(model).count("com.microsoft.MultiHeadAttention") == 1


@pytest.mark.parametrize(
    ("text", "half", "reason"),
    [
        (masked("bool"), False, "masked"),
        (ATTENTION.replace("Attention (", "Attention <is_causal = 1> ("), False, "causal"),
        (ATTENTION, True, "FLOAT16"),
    ],
)
def test_attention_that_onnxruntime_has_no_kernel_for_stays(text: str, half: bool, reason: str) -> None:
    model = fused(make_attention(text))
    if half:
        CastFp16().run(model)
    report = LowerMultiHeadAttention().run(model)
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True]


def test_group_norm_becomes_instance_norm() -> None:
    model = make_resnet()
    feeds = [feed_resnet(), feed_resnet(scale=0.01, batch=1)]
    assert apply_proven(LowerGroupNorm(), model, feeds)[0].matched == 2
    assert operators(model).count("InstanceNormalization") == 2


def test_group_norm_over_tokens_is_lowered_too() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[B, 6, S] x) => (float[B, 6, S] y)
        { y = GroupNormalization <num_groups = 2, epsilon = 1e-2> (x, gamma, beta) }"""
    model = make_model(text, {"gamma": normal(1, 6), "beta": normal(2, 6)})
    assert apply_proven(LowerGroupNorm(), model, [{"x": normal(3, 2, 6, 11)}])[0].matched == 1


@pytest.mark.parametrize(("kind", "reason"), [("half", "FLOAT16"), ("computed", "is computed")])
def test_group_norm_that_cannot_be_lowered_stays(kind: str, reason: str) -> None:
    gamma = "gamma = Neg (beta)  " if kind == "computed" else ""
    text = f"""<ir_version: 10, opset_import: ["": 23]> g (float[B, 6, S] x) => (float[B, 6, S] y)
        {{ {gamma}y = GroupNormalization <num_groups = 2> (x, gamma, beta) }}"""
    weights = {"beta": normal(2, 6)} | ({} if gamma else {"gamma": normal(1, 6)})
    model = make_model(text, weights)
    if kind == "half":
        CastFp16().run(model)
    report = LowerGroupNorm().run(model)
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", ir.DataType.FLOAT), ("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)],
)
def test_openvino_sees_no_group_norm(precision: str, dtype: ir.DataType) -> None:
    model = fused(make_resnet())
    run_passes([*precision_passes(precision), *lowering_passes("openvino")], model)
    assert operators(model).count("GroupNormalization") == 0
    assert operators(model).count("InstanceNormalization") == 2
    dtypes = {node.outputs[0].dtype for node in model.graph if node.op_type == "InstanceNormalization"}
    assert dtypes == {dtype}


def test_half_group_norm_is_close_to_the_whole_one() -> None:
    feeds = feed_resnet()
    model = make_resnet()
    expected = run_model(model, feeds)
    CastFp16().run(model)
    assert LowerGroupNorm(frozenset({ir.DataType.FLOAT16})).run(model).matched == 2
    assert 0 < relative_error(model, expected, feeds) < 2e-3


@pytest.mark.parametrize("text", [ATTENTION, masked("bool"), masked("float")], ids=["plain", "bool", "float"])
def test_decomposed_attention_is_equal(text: str) -> None:
    model = make_attention(text)
    (report,) = apply_proven(DECOMPOSE, model, FEEDS[:1])
    assert report.matched == 1
    assert operators(model).count("Softmax") == 1
    assert "Attention" not in operators(model)


def test_row_without_any_key_stays_finite() -> None:
    model = make_attention(masked("bool").replace("mask = {1,", "mask = {0,"))
    DECOMPOSE.run(model)
    outputs = run_model(model, FEEDS[0])
    assert all(abs(value).max() < 1e3 for value in outputs.values())


def test_decomposition_in_half_is_half() -> None:
    model, feeds = make_attention(masked("bool")), FEEDS[0]
    expected = run_model(model, feeds)
    CastFp16().run(model)
    assert DECOMPOSE.run(model).matched == 1
    assert relative_error(model, expected, feeds) < 4e-3


def test_attention_with_a_fused_kernel_is_kept() -> None:
    model = make_attention()
    CastFp16().run(model)
    report = DecomposeAttention(frozenset({ir.DataType.FLOAT16}), frozenset({5})).run(model)
    assert (report.matched, report.details) == (0, {"kept_fused": 1})


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Attention (q", "Attention <is_causal = 1> (q", "causal"),
        ("attended = Attention (q, k, v)", "attended, present = Attention (q, k, v, , k, v)", "cache"),
    ],
)
def test_attention_that_cannot_be_decomposed_stays(old: str, new: str, reason: str) -> None:
    report = DECOMPOSE.run(make_attention(ATTENTION.replace(old, new)))
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True]


def test_attention_of_unknown_shape_is_left_to_the_backend() -> None:
    model = make_attention()
    for node in model.graph:
        node.outputs[0].shape = None
    assert "rank 4" in DECOMPOSE.run(model).skipped[0].reason


def test_left_over_operators_are_refused() -> None:
    model = fused(make_resnet())
    with pytest.raises(PassError, match=r"sdc\.AddGroupNormSilu"):
        CheckOperators().run(model)
    InlineFunctions(fused=True).run(model)
    assert CheckOperators().run(model).matched == 0


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(InputError, match="choose one of openvino"):
        lowering_passes("cuda")
