from __future__ import annotations

from collections.abc import Callable

import pytest
from equality import FP32, apply_proven, operators, relative_error, run_model
from transformer_graph import FEEDS, TRANSFORMER, make_transformer

from sdc.passes.base import run_passes
from sdc.passes.fusion.fuse_tokens import FuseTokens
from sdc.passes.pipeline import lowering_passes
from sdc.passes.precision.cast_fp16 import CastFp16
from sdc.passes.simplify.remove_unused import RemoveUnused

IN = "rows = Transpose <perm = [0, 2, 3, 1]> (image)\n    tokens = Reshape (rows, to_tokens)"
OUT = "rows2 = Reshape (sum3, size)\n    image2 = Transpose <perm = [0, 3, 1, 2]> (rows2)"
OTHER_IN = "rows = Reshape (image, to_rows)\n    tokens = Transpose <perm = [0, 2, 1]> (rows)"
OTHER_OUT = "rows2 = Transpose <perm = [0, 2, 1]> (sum3)\n    image2 = Reshape (rows2, size)"
OTHER = (
    TRANSFORMER.replace(IN, OTHER_IN)
    .replace(OUT, OTHER_OUT)
    .replace("float[B, H, W, 10] rows,", "float[B, 10, S] rows,")
    .replace("float[B, H, W, 10] rows2,", "float[B, 10, S] rows2,")
    .replace("int64[3] to_tokens = {0, -1, 10}", "int64[3] to_rows = {0, 10, -1}, int64[1] width = {10}")
    .replace("(keep, plane, rest)", "(keep, width, plane)")
)


@pytest.mark.parametrize("text", [TRANSFORMER, OTHER], ids=["channels last", "rows"])
def test_both_ways_become_one_node_without_arithmetic(text: str) -> None:
    model = make_transformer(text)
    reports = apply_proven([FuseTokens(), RemoveUnused()], model, FEEDS)
    assert (reports[0].skipped, reports[0].details) == ((), {"tokens_from_image": 1, "image_from_tokens": 1})
    assert not {"Transpose", "Reshape", "Shape", "Concat"} & set(operators(model))
    back = next(node for node in model.graph if node.op_type == "ImageFromTokens")
    assert [value.name for value in back.inputs] == ["sum3", "image"]


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "tensorrt_rtx"])
def test_lowering_arranges_channels_last(backend: str) -> None:
    model = make_transformer(OTHER)
    expected = run_model(model, FEEDS[1])
    run_passes([FuseTokens(), RemoveUnused(), *lowering_passes(backend)], model)
    orders = [list(node.attributes["perm"].as_ints()) for node in model.graph if node.op_type == "Transpose"]
    assert orders == [[0, 2, 3, 1], [0, 3, 1, 2]]
    assert relative_error(model, expected, FEEDS[1]) <= FP32


def swap_height_and_width_going_in(text: str) -> str:
    """A transpose that is none of ours."""
    return text.replace("perm = [0, 2, 3, 1]", "perm = [0, 3, 2, 1]").replace(
        "[B, H, W, 10] rows,", "[B, W, H, 10] rows,"
    )


def swap_height_and_width_going_out(text: str) -> str:
    """The same on the way back, undone behind it."""
    text = text.replace("perm = [0, 3, 1, 2]", "perm = [0, 3, 2, 1]").replace("H, W] image2>", "W, H] image2>")
    return text.replace("y = Add (out, skip)", "o2 = Transpose <perm = [0, 1, 3, 2]> (out)  y = Add (o2, skip)")


def read_between_going_in(text: str) -> str:
    """Another reader of what stands between Transpose and Reshape."""
    mean = "m = ReduceMean <keepdims = 0> (rows)  s1 = Add (biased1, tokens)  sum1 = Add (s1, m)"
    return text.replace("sum1 = Add (biased1, tokens)", mean)


def read_between_going_out(text: str) -> str:
    """Another reader of what stands between Reshape and Transpose."""
    return text.replace("y = Add (out, skip)", "m = ReduceMean (rows2)  o2 = Add (out, m)  y = Add (o2, skip)")


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (swap_height_and_width_going_in, 0),
        (read_between_going_in, 0),
        (swap_height_and_width_going_out, 1),
        (read_between_going_out, 1),
    ],
)
def test_change_of_layout_that_is_another_one_stays(change: Callable[[str], str], fused: int) -> None:
    model = make_transformer(change(TRANSFORMER))
    (report,) = apply_proven(FuseTokens(), model, FEEDS)
    assert report.matched == fused


def test_image_of_another_size_is_not_taken_as_the_like() -> None:
    model = make_transformer(TRANSFORMER.replace("float[B, 10, H, W] image2>", "float[B, 10, H, N] image2>"))
    report = FuseTokens().run(model)
    assert report.matched == 1
    assert ["was turned into tokens" in each.reason for each in report.skipped] == [True]


@pytest.mark.parametrize("name", ["image", "rows", "tokens"])
def test_unknown_shape_is_left_alone(name: str) -> None:
    model = make_transformer()
    next(value for node in model.graph for value in node.outputs if value.name == name).shape = None
    assert FuseTokens().run(model).details == {"tokens_from_image": 0, "image_from_tokens": 0}


def test_channels_that_do_not_agree_are_left_alone() -> None:
    model = make_transformer(TRANSFORMER.replace("float[B, S, 10] tokens", "float[B, S, N] tokens"))
    assert FuseTokens().run(model).matched == 0


def test_half_is_close() -> None:
    model = make_transformer()
    expected = run_model(model, FEEDS[0])
    run_passes([FuseTokens(), CastFp16()], model)
    assert relative_error(model, expected, FEEDS[0]) < 5e-3
