"""What stands before or behind a GroupNorm besides the sum of `FuseAddGroupNormSilu`."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from equality import apply_proven, make_model, operators, relative_error, run_model
from small_graphs import normal
from transformer_graph import FEEDS, TRANSFORMER, make_transformer

from sdc.passes.base import run_passes
from sdc.passes.fusion.fuse_add_group_norm import FuseAddGroupNorm
from sdc.passes.fusion.fuse_concat_group_norm_silu import FuseConcatGroupNormSilu
from sdc.passes.fusion.fuse_group_norm_silu import FuseGroupNormSilu
from sdc.passes.fusion.fuse_group_norm_silu_add import FuseGroupNormSiluAdd
from sdc.passes.fusion.unflatten_group_norm import UnflattenGroupNorm
from sdc.passes.precision.cast_fp16 import CastFp16
from sdc.passes.raising.raise_silu import RaiseSilu

JOIN = """
<ir_version: 10, opset_import: ["": 23]>
up (float[B, 4, H, W] x, float[B, 5, H, W] skip) => (float[B, 9, H, W] y, float[B, 6, H, W] short)
{
    joined = Concat <axis = 1> (x, skip)
    normed = GroupNormalization <num_groups = 3, epsilon = 1e-3> (joined, gamma, beta)
    gate = Sigmoid (normed)
    y = Mul (normed, gate)
    short = Conv (joined, w)
}
"""
LITERAL = """
<ir_version: 10, opset_import: ["": 23]>
post (float[B, 4, H, W] x, float[B, 9, H, W] r) => (float[B, 9, H, W] y)
{
    branch = Conv (x, w)
    normed = GroupNormalization <num_groups = 3, epsilon = 1e-3> (branch, gamma, beta)
    gate = Sigmoid (normed)
    active = Mul (normed, gate)
    y = Add (r, active)
}
"""
FLAT = """
<ir_version: 10, opset_import: ["": 23]>
flat (float[B, 9, H, W] x) => (float[B, S, 9] y)
<int64[3] rows = {0, 9, -1}, float[B, 9, S] flattened>
{
    flattened = Reshape (x, rows)
    normed = GroupNormalization <num_groups = 3, epsilon = 1e-3> (flattened, gamma, beta)
    y = Transpose <perm = [0, 2, 1]> (normed)
}
"""
AFFINE = {"gamma": normal(1, 9), "beta": normal(2, 9)}
JOIN_FEEDS = [{"x": s * normal(4, 2, 4, 5, 7), "skip": s * normal(5, 2, 5, 5, 7)} for s in (1, 0.01)]
LITERAL_FEEDS = [{"x": s * normal(4, 2, 4, 5, 7), "r": s * normal(5, 2, 9, 5, 7)} for s in (1, 0.01)]
FLAT_FEEDS = [{"x": s * normal(4, 2, 9, 5, 7)} for s in (1, 0.01)]
FUSE_NORM = [RaiseSilu(), FuseGroupNormSilu()]


def make_join(text: str = JOIN) -> ir.Model:
    return make_model(text, AFFINE | {"w": normal(3, 6, 9, 1, 1)})


def make_literal(text: str = LITERAL) -> ir.Model:
    return make_model(text, AFFINE | {"w": normal(3, 9, 4, 1, 1)})


def test_sum_and_norm_without_silu_become_one_node() -> None:
    model = make_transformer()
    (report,) = apply_proven(FuseAddGroupNorm(), model, FEEDS)
    assert (report.matched, report.skipped, report.details) == (1, (), {"forms": {"skip_add": 1}})
    assert operators(model)[:2] == ["sdc.AddGroupNorm", "Conv"]
    assert [value.name for value in model.graph[0].outputs] == ["normed0", "skip"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("num_groups = 3,", "num_groups = 3, stash_type = 10,", "statistics in FLOAT16"),
        ("(skip, gamma0, beta0)", "(skip, gamma0, computed)", "gamma or beta is computed"),
        ("skip = Add (before, x)", "row = ReduceMean <keepdims = 1> (x, axes)  skip = Add (before, row)", "neither"),
    ],
)
def test_sum_that_cannot_be_fused_says_why(old: str, new: str, reason: str) -> None:
    text = TRANSFORMER.replace(old, new).replace("int64[1] keep", "int64[1] axes = {1}, int64[1] keep")
    text = text.replace("normed0 =", "computed = Neg (beta0)  normed0 =") if "computed" in new else text
    report = FuseAddGroupNorm().run(make_transformer(text))
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True]


def test_join_and_norm_become_one_node_that_gives_what_was_joined() -> None:
    model = make_join()
    report = apply_proven([*FUSE_NORM, FuseConcatGroupNormSilu()], model, JOIN_FEEDS)[-1]
    assert (report.matched, report.skipped) == (1, ())
    assert operators(model) == ["sdc.ConcatGroupNormSilu", "Conv"]


def test_axis_from_the_end_is_the_same_axis() -> None:
    model = make_join(JOIN.replace("axis = 1", "axis = -3"))
    assert apply_proven([*FUSE_NORM, FuseConcatGroupNormSilu()], model, JOIN_FEEDS)[-1].matched == 1


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Concat <axis = 1> (x, skip)", "Concat <axis = 1> (x, extra, skip)", "3 tensors"),
        ("Concat <axis = 1> (x, skip)", "Concat <axis = 2> (nine, nine)", "along axis 2"),
        ("(joined, gamma, beta)", "(joined, gamma, computed)", "gamma or beta is computed"),
    ],
)
def test_join_that_cannot_be_fused_says_why(old: str, new: str, reason: str) -> None:
    text = JOIN.replace(old, new)
    text = text.replace("joined =", "extra = Slice (x, one, one, one)  joined =") if "extra" in new else text
    text = text.replace("joined =", "nine = Concat <axis = 1> (x, skip)  joined =") if "nine" in new else text
    text = text.replace("normed =", "computed = Neg (beta)  normed =")
    text = text.replace("{\n    ", "<int64[1] one = {1}>\n{\n    ", 1) if "extra" in new else text
    model = make_join(text)
    run_passes(FUSE_NORM, model)
    report = FuseConcatGroupNormSilu().run(model)
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True]


def test_literal_chain_becomes_one_node() -> None:
    model = make_literal()
    report = apply_proven([*FUSE_NORM, FuseGroupNormSiluAdd()], model, LITERAL_FEEDS)[-1]
    assert (report.matched, report.skipped) == (1, ())
    assert operators(model) == ["Conv", "sdc.GroupNormSiluAdd"]


@pytest.mark.parametrize(
    ("old", "new", "skipped"),
    [
        ("y = Add (r, active)", "y = Add (gamma4, active)", 1),
        ("y = Add (r, active)", "y = Add (active, active)", 1),
        ("y = Add (r, active)", "z = Add (r, active)  y = Mul (z, active)", 0),
        ("y = Add (r, active)", "y = Mul (r, active)", 0),
    ],
    ids=["broadcast", "twice", "read elsewhere", "no sum"],
)
def test_literal_chain_that_is_none_stays(old: str, new: str, skipped: int) -> None:
    text = LITERAL.replace(old, new)
    if "gamma4" in new:
        text = text.replace("branch =", "gamma4 = Unsqueeze (gamma, planes)  branch =")
        text = text.replace("{\n    ", "<int64[3] planes = {0, 2, 3}>\n{\n    ", 1)
    model = make_literal(text)
    report = apply_proven([*FUSE_NORM, FuseGroupNormSiluAdd()], model, LITERAL_FEEDS)[-1]
    assert (report.matched, len(report.skipped)) == (0, skipped)


def test_norm_of_rows_becomes_one_of_the_image() -> None:
    model = make_model(FLAT, AFFINE)
    assert apply_proven(UnflattenGroupNorm(), model, FLAT_FEEDS)[0].matched == 1
    assert operators(model) == ["Reshape", "GroupNormalization", "Reshape", "Transpose"]
    assert model.graph[1].inputs[0] is model.graph.inputs[0]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("float[B, 9, S] flattened", "float[N, 9, S] flattened", "expected the same batch"),
        ("float[B, 9, H, W] x", "float[B, C, H, W] x", "expected the same batch"),
    ],
)
def test_rows_of_something_else_stay(old: str, new: str, reason: str) -> None:
    report = UnflattenGroupNorm().run(make_model(FLAT.replace(old, new), AFFINE))
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True]


def test_rows_of_unknown_shape_stay() -> None:
    model = make_model(FLAT, AFFINE)
    model.graph.inputs[0].shape = None
    assert ["are unknown" in each.reason for each in UnflattenGroupNorm().run(model).skipped] == [True]


def test_half_is_close() -> None:
    for make, last, feeds in (
        (make_join, FuseConcatGroupNormSilu(), JOIN_FEEDS[0]),
        (make_literal, FuseGroupNormSiluAdd(), LITERAL_FEEDS[0]),
        (make_transformer, FuseAddGroupNorm(), FEEDS[0]),
    ):
        model = make()
        expected = run_model(model, feeds)
        run_passes([*FUSE_NORM, last, CastFp16()], model)
        assert relative_error(model, expected, feeds) < 5e-3
