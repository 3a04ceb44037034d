from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest
from equality import FP32, apply_proven, operators, relative_error, run_model
from small_graphs import RESNET, feed_resnet, make_resnet

from sdc.engines.errors import PassError
from sdc.passes.fusion.fuse_add_group_norm_silu import FuseAddGroupNormSilu
from sdc.passes.fusion.fuse_group_norm_silu import FuseGroupNormSilu
from sdc.passes.raising.raise_silu import RaiseSilu

# The small inputs make epsilon matter: their variance is below it.
FEEDS = [feed_resnet(), feed_resnet(batch=1, height=8, width=3), feed_resnet(scale=0.01)]
FUSE_NORM = (RaiseSilu(), FuseGroupNormSilu())
FUSE = (*FUSE_NORM, FuseAddGroupNormSilu())


def test_norm_and_silu_become_one_node() -> None:
    model = make_resnet()
    reports = apply_proven(FUSE_NORM, model, FEEDS)
    assert reports[1].matched == 2
    assert operators(model) == [
        *("Conv", "Unsqueeze", "Add", "sdc.GroupNormSilu"),
        *("Conv", "Add", "sdc.GroupNormSilu", "Conv", "Add"),
    ]


def test_sum_before_the_norm_is_fused_and_still_read() -> None:
    model = make_resnet()
    reports = apply_proven(FUSE, model, FEEDS)
    assert operators(model) == [
        *("Conv", "Unsqueeze", "sdc.AddGroupNormSilu", "Conv", "sdc.AddGroupNormSilu", "Conv", "Add")
    ]
    assert reports[2].matched == 2
    assert reports[2].details == {"forms": {"conv_time_embedding_add": 1, "skip_add": 1}, "sum_reused": 1}
    assert "sdc" in model.opset_imports


def test_branch_comes_before_what_is_added() -> None:
    model = make_resnet()
    apply_proven(FUSE, model, FEEDS)
    fused = [node for node in model.graph if node.op_type == "AddGroupNormSilu"]
    assert [[value.name for value in node.inputs[:2]] for node in fused] == [["first", "shift"], ["second", "x"]]


def test_other_forms_are_counted() -> None:
    text = RESNET.replace("shifted = Add (first, shift)", "").replace("(shifted,", "(first,")
    text = text.replace("skip = Add (x, second)", "skip = Concat <axis = 1> (first3, second3)")
    text = text.replace("second = Conv", "first3 = Slice (first, zero, three, one)  second = Conv")
    text = text.replace("skip =", "second3 = Slice (second, zero, three, one)  skip =")
    text = text.replace("int64[2] planes = {2, 3}", "int64[1] zero = {0}, int64[1] three = {3}, int64[1] one = {1}")
    model = make_resnet(text.replace("shift = Unsqueeze (time, planes)", ""))
    reports = apply_proven(FUSE, model, FEEDS)
    assert reports[2].details == {"forms": {"concat": 1, "conv": 1}, "sum_reused": 0}
    assert reports[2].matched == 0


def test_norm_without_silu_is_counted_not_skipped() -> None:
    model = make_resnet(
        RESNET.replace("gate1 = Sigmoid (normed1)", "").replace("Mul (normed1, gate1)", "Neg (normed1)")
    )
    reports = apply_proven(FUSE_NORM, model, FEEDS)
    assert (reports[1].matched, reports[1].skipped) == (1, ())
    assert reports[1].details == {"without_silu": 1}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("y = Add (skip, third)", "y = Sum (skip, third, normed2)", "something besides the SiLU"),
        ("num_groups = 2,", "num_groups = 2, stash_type = 10,", "statistics in FLOAT16"),
    ],
)
def test_norm_that_cannot_be_fused_says_why(old: str, new: str, reason: str) -> None:
    model = make_resnet(RESNET.replace(old, new))
    report = [each.run(model) for each in FUSE_NORM][1]
    assert report.matched == 1
    assert [reason in each.reason for each in report.skipped] == [True]
    assert operators(model).count("GroupNormalization") == 1


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Add (first, shift)", "Add (first, row)", "neither equal nor one value per channel"),
        ("(shifted, gamma1, beta1)", "(shifted, gamma1, computed)", "gamma or beta is computed"),
    ],
)
def test_sum_that_cannot_be_fused_says_why(old: str, new: str, reason: str) -> None:
    text = RESNET.replace(old, new)
    if "row" in new:
        text = text.replace("shifted =", "row = ReduceMean <keepdims = 1> (x, planes1)  shifted =")
        text = text.replace("int64[2] planes", "int64[2] planes1 = {1, 2}, int64[2] planes")
    else:
        text = text.replace("shifted =", "computed = Neg (beta1)  shifted =")
    model = make_resnet(text)
    reports = apply_proven(FUSE, model, FEEDS)
    assert [reason in each.reason for each in reports[2].skipped] == [True]
    assert reports[2].matched == 1


def test_sum_of_unknown_shape_is_left_alone() -> None:
    model = make_resnet()
    for each in FUSE_NORM:
        each.run(model)
    for node in model.graph:
        if node.op_type == "Add":
            node.outputs[0].shape = None
    report = FuseAddGroupNormSilu().run(model)
    assert report.matched == 0
    assert {each.reason for each in report.skipped} == {"the shape of the sum or of a term is unknown"}


def test_sum_that_is_an_output_stays_one() -> None:
    text = RESNET.replace("(float[B, 6, H, W] y)", "(float[B, 6, H, W] y, float[B, 6, H, W] shifted)")
    model = make_resnet(text)
    reports = apply_proven(FUSE, model, FEEDS)
    assert reports[2].details is not None
    assert reports[2].details["sum_reused"] == 2


def test_nothing_to_fuse_is_an_error_where_sites_are_known_to_be() -> None:
    model = make_resnet(RESNET.replace("Sigmoid", "Tanh"))
    with pytest.raises(PassError, match="expected at least one site, fused none"):
        FuseGroupNormSilu(required=True).run(model)
    assert FuseGroupNormSilu().run(model).matched == 0


def drop_epsilon(node: ir.Node) -> None:
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)


def merge_groups(node: ir.Node) -> None:
    node.attributes["num_groups"] = ir.AttrInt64("num_groups", 1)


def swap_gamma_and_beta(node: ir.Node) -> None:
    gamma, beta = node.inputs[2:]
    node.replace_input_with(2, beta)
    node.replace_input_with(3, gamma)


def add_to_itself(node: ir.Node) -> None:
    node.replace_input_with(1, node.inputs[0])


def read_norm_as_sum(node: ir.Node) -> None:
    node.outputs[1].replace_all_uses_with(node.outputs[0])


@pytest.mark.parametrize(
    "break_node", [drop_epsilon, merge_groups, swap_gamma_and_beta, add_to_itself, read_norm_as_sum]
)
def test_equality_sees_a_broken_fusion(break_node: Callable[[ir.Node], None]) -> None:
    model = make_resnet()
    expected = [run_model(model, feeds) for feeds in FEEDS]
    for each in FUSE:
        each.run(model)
    for node in [node for node in model.graph if node.op_type == "AddGroupNormSilu"]:
        break_node(node)
    errors = [relative_error(model, outputs, feeds) for outputs, feeds in zip(expected, FEEDS, strict=True)]
    assert max(errors) > 100 * FP32
