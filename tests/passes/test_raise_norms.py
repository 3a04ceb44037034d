"""Group and layer norms in the spellings of exporters."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from equality import FP32, apply_proven, make_model, operators, relative_error
from small_graphs import normal

from sdc.passes.raising.raise_group_norm import RaiseGroupNorm
from sdc.passes.raising.raise_layer_norm import RaiseLayerNorm
from sdc.passes.shapes.infer_shapes import InferShapes
from sdc.passes.simplify.convert_opset import ConvertOpset
from sdc.passes.simplify.fold_constants import FoldConstants
from sdc.passes.simplify.remove_unused import RemoveUnused

GROUP_NORM = """
<ir_version: 10, opset_import: ["": 23]>
norm (float[B, 6, 5, 7] x) => (float[B, 6, 5, 7] y)
<int64[3] fold = {0, 3, -1}, int64[4] unfold = {0, 6, 5, 7}, float[3] ones = {1, 1, 1}, float[3] zeros = {0, 0, 0}>
{
    folded = Reshape (x, fold)
    normed = InstanceNormalization <epsilon = 1e-2> (folded, ones, zeros)
    unfolded = Reshape (normed, unfold)
    scaled = Mul (unfolded, gamma)
    y = Add (scaled, beta)
}
"""
LAYER_NORM = """
<ir_version: 10, opset_import: ["": 23]>
norm (float[B, 5, 7] x) => (float[B, 5, 7] y)
<int64[1] last = {-1}, float two = {2}, float epsilon = {0.01}>
{
    mean = ReduceMean (x, last)
    centred = Sub (x, mean)
    squared = Pow (centred, two)
    variance = ReduceMean (squared, last)
    shifted = Add (variance, epsilon)
    root = Sqrt (shifted)
    normed = Div (centred, root)
    scaled = Mul (normed, gamma)
    y = Add (scaled, beta)
}
"""


def group_norm(text: str = GROUP_NORM, *, shape: tuple[int, ...] = (6, 1, 1)) -> ir.Model:
    weights = {"gamma": normal(1, *shape), "beta": normal(2, *shape)}
    return make_model(text, {name: value for name, value in weights.items() if f"{name})" in text})


def layer_norm(text: str = LAYER_NORM, *, size: int = 7) -> ir.Model:
    weights = {"gamma": normal(1, size), "beta": normal(2, size)}
    return make_model(
        text, {name: value for name, value in weights.items() if f"{name})" in text or f"({name}" in text}
    )


GROUP_FEEDS = [{"x": scale * normal(3, batch, 6, 5, 7) + 0.5} for batch, scale in ((3, 1.0), (1, 0.03))]
"""Of the second, the variance is below epsilon."""
LAYER_FEEDS = [{"x": scale * normal(3, batch, 5, 7) + 0.5} for batch, scale in ((3, 1.0), (1, 0.03))]


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1)])
def test_chain_is_one_group_norm(shape: tuple[int, ...]) -> None:
    model = group_norm(shape=shape)
    reports = apply_proven((RaiseGroupNorm(), RemoveUnused()), model, GROUP_FEEDS)
    assert (reports[0].matched, reports[0].skipped) == (1, ())
    assert operators(model) == ["GroupNormalization"]
    (norm,) = model.graph
    assert norm.attributes["num_groups"].as_int() == 3
    assert norm.attributes["epsilon"].as_float() == pytest.approx(1e-2)


def test_operands_of_the_affine_part_stand_in_either_order() -> None:
    text = GROUP_NORM.replace("Mul (unfolded, gamma)", "Mul (gamma, unfolded)").replace(
        "(scaled, beta)", "(beta, scaled)"
    )
    model = make_model(text, {"gamma": normal(1, 6, 1, 1), "beta": normal(2, 6, 1, 1)})
    assert apply_proven((RaiseGroupNorm(), RemoveUnused()), model, GROUP_FEEDS)[0].matched == 1
    assert operators(model) == ["GroupNormalization"]


def test_group_norm_without_its_affine_part_gets_neutral_ones() -> None:
    model = group_norm(
        GROUP_NORM.replace("scaled = Mul (unfolded, gamma)", "").replace("Add (scaled, beta)", "Neg (unfolded)")
    )
    apply_proven((RaiseGroupNorm(), RemoveUnused()), model, GROUP_FEEDS)
    assert operators(model) == ["GroupNormalization", "Neg"]


def test_affine_part_that_something_else_reads_in_between_stays() -> None:
    model = group_norm(
        GROUP_NORM.replace("y = Add (scaled, beta)", "shifted = Add (scaled, beta)  y = Sub (shifted, scaled)")
    )
    apply_proven((RaiseGroupNorm(), RemoveUnused()), model, GROUP_FEEDS)
    assert operators(model) == ["GroupNormalization", "Add", "Sub"]


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 1), (6, 5, 1)])
def test_other_factors_are_not_gamma(shape: tuple[int, ...]) -> None:
    model = group_norm(shape=shape)
    apply_proven((RaiseGroupNorm(), RemoveUnused()), model, GROUP_FEEDS)
    assert operators(model) == ["GroupNormalization", "Mul", "Add"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "InstanceNormalization <epsilon = 1e-2> (folded",
            "InstanceNormalization <epsilon = 1e-2> (twice",
            "not between",
        ),
        (
            "unfolded = Reshape (normed, unfold)",
            "sums = Neg (normed)  unfolded = Reshape (sums, unfold)",
            "not between",
        ),
        ("int64[4] unfold = {0, 6, 5, 7}", "int64[4] unfold = {0, 6, 7, 5}", "expected the operand's"),
        ("float[3] ones = {1, 1, 1}", "float[3] ones = {1, 2, 1}", "scale or bias of its own"),
        ("float[3] zeros = {0, 0, 0}", "float[3] zeros = {0, 0.5, 0}", "scale or bias of its own"),
    ],
)
def test_what_is_no_group_norm_stays(old: str, new: str, reason: str) -> None:
    text = GROUP_NORM.replace(old, new).replace("normed = Inst", "twice = Add (folded, folded)  normed = Inst")
    if "{0, 6, 7, 5}" in new:
        text = text.replace("float[B, 6, 5, 7] y", "float[B, 6, 7, 5] y")
    model = group_norm(text)
    before = operators(model)
    feeds = GROUP_FEEDS[:1]
    (report,) = apply_proven(RaiseGroupNorm(), model, feeds)
    assert report.matched == 0
    assert reason in report.skipped[0].reason
    assert operators(model) == before


def test_groups_across_the_batch_stay() -> None:
    text = GROUP_NORM.replace("[B, 6, 5, 7]", "[2, 6, 5, 7]").replace("fold = {0, 3, -1}", "fold = {4, 3, 35}", 1)
    text = text.replace("unfold = {0, 6, 5, 7}", "unfold = {2, 6, 5, 7}")
    model = group_norm(text)
    (report,) = apply_proven(RaiseGroupNorm(), model, [{"x": normal(3, 2, 6, 5, 7)}])
    assert report.matched == 0
    assert "expected [batch, groups, rest]" in report.skipped[0].reason


def test_older_group_norm_gets_one_scale_per_channel() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 18]>
        norm (float[B, 6, 5, 7] x, float[3] gamma, float[3] beta) => (float[B, 6, 5, 7] y)
        { y = GroupNormalization <num_groups = 3, epsilon = 1e-2> (x, gamma, beta) }
    """
    # Neither ONNX's checker nor ONNX Runtime takes the operator any more: the answer is computed here.
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    gamma, beta = normal(1, 3), normal(2, 3)
    for value, array in zip(list(model.graph.inputs[1:]), (gamma, beta), strict=True):
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array)
        model.graph.register_initializer(value)
    ConvertOpset().run(model)
    x = GROUP_FEEDS[0]["x"]
    groups = x.reshape(3, 3, -1)
    normed = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-2)
    expected = (normed * gamma[:, None] + beta[:, None]).reshape(x.shape)
    assert relative_error(model, {"y": expected.astype(np.float32)}, {"x": x}) <= FP32


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("Pow (centred, two)", "Mul (centred, centred)"),
        ("Add (variance, epsilon)", "Add (epsilon, variance)"),
        ("Mul (normed, gamma)", "Mul (gamma, normed)"),
        ("Add (scaled, beta)", "Add (beta, scaled)"),
        ("normed = Div (centred, root)", "inverse = Reciprocal (root)  normed = Mul (inverse, centred)"),
    ],
)
def test_spellings_of_layer_norm_are_one_node(old: str, new: str) -> None:
    model = layer_norm(LAYER_NORM.replace(old, new) if old else LAYER_NORM)
    reports = apply_proven((RaiseLayerNorm(), RemoveUnused()), model, LAYER_FEEDS)
    assert (reports[0].matched, reports[0].skipped) == (1, ())
    assert operators(model) == ["LayerNormalization"]


def test_axes_of_older_graphs_are_understood() -> None:
    text = (
        LAYER_NORM.replace('"": 23', '"": 14')
        .replace("int64[1] last = {-1}, ", "")
        .replace("ReduceMean (x, last)", "ReduceMean <axes = [-1]> (x)")
    )
    model = layer_norm(
        text.replace("ReduceMean (squared, last)", "ReduceMean <axes = [2]> (squared)").replace(
            "ir_version: 10", "ir_version: 8"
        )
    )
    apply_proven((ConvertOpset(), RaiseLayerNorm(), RemoveUnused()), model, LAYER_FEEDS)
    assert operators(model) == ["LayerNormalization"]


def test_conversion_to_a_wider_type_in_between_goes() -> None:
    text = (
        LAYER_NORM.replace("float[B", "float16[B")
        .replace("float two", "double two")
        .replace("float epsilon", "double epsilon")
    )
    text = text.replace("squared = Pow (centred,", "wide = Cast <to = 11> (centred)  squared = Pow (wide,")
    text = text.replace("normed = Div (centred, root)", "exact = Div (wide, root)  normed = Cast <to = 10> (exact)")
    model = make_model(text, {name: normal(n, 7).astype(np.float16) for n, name in ((1, "gamma"), (2, "beta"))})
    feeds = [{name: value.astype(np.float16) for name, value in each.items()} for each in LAYER_FEEDS]
    # The source rounds the deviation to 2^-11 before it is squared, and the result is a few units large.
    apply_proven((RaiseLayerNorm(), RemoveUnused()), model, feeds, tolerance=4 * 2.0**-11)
    assert operators(model) == ["LayerNormalization"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("float two = {2}", "float two = {4}", "not the square of a difference"),
        ("centred = Sub (x, mean)", "other = Neg (x)  centred = Sub (other, mean)", "its own mean"),
        ("mean = ReduceMean (x, last)", "mean = ReduceMean (x, first)", "not over the last dimension alone"),
        (
            "variance = ReduceMean (squared, last)",
            "variance = ReduceMean (squared, both)",
            "not over the last dimension",
        ),
        ("normed = Div (centred, root)", "normed = Div (x, root)", "not divided by the root"),
        ("y = Add (scaled, beta)", "y = Neg (scaled)", "no Add with gamma or beta follows"),
        ("scaled = Mul (normed, gamma)", "scaled = Mul (normed, x)", "not an initialiser"),
    ],
)
def test_what_is_no_layer_norm_stays(old: str, new: str, reason: str) -> None:
    text = LAYER_NORM.replace(old, new).replace(
        "int64[1] last", "int64[1] first = {1}, int64[2] both = {1, 2}, int64[1] last"
    )
    model = layer_norm(text)
    before = operators(model)
    (report,) = apply_proven(RaiseLayerNorm(), model, LAYER_FEEDS)
    assert report.matched == 0
    assert reason in report.skipped[0].reason
    assert operators(model) == before


def test_parameters_of_other_types_than_x_stay() -> None:
    text = LAYER_NORM.replace("float[B", "float16[B").replace("centred = Sub (x, mean)", "centred = Sub (wide, mean)")
    text = text.replace("mean = ReduceMean (x, last)", "wide = Cast <to = 1> (x)  mean = ReduceMean (wide, last)")
    text = text.replace("y = Add (scaled, beta)", "half = Cast <to = 10> (scaled)  y = Add (half, beta)")
    model = make_model(text, {"gamma": normal(1, 7), "beta": normal(2, 7).astype(np.float16)})
    feeds = [{name: value.astype(np.float16) for name, value in each.items()} for each in LAYER_FEEDS]
    (report,) = apply_proven(RaiseLayerNorm(), model, feeds)
    assert report.matched == 0
    assert "gamma and beta are" in report.skipped[0].reason


def test_root_of_no_variance_is_not_reported() -> None:
    model = make_model(
        '<ir_version: 10, opset_import: ["": 23]> g (float[B, 3] x) => (float[B, 3] y) { z = Abs (x)  y = Sqrt (z) }',
        {},
    )
    assert RaiseLayerNorm().run(model).skipped == ()


def test_unsqueezed_parameters_are_gamma_and_beta_once_they_are_folded() -> None:
    text = GROUP_NORM.replace(
        "scaled = Mul (unfolded, gamma)", "planes = Unsqueeze (gamma, axes)  scaled = Mul (unfolded, planes)"
    )
    model = make_model(
        text.replace("int64[3] fold", "int64[2] axes = {1, 2}, int64[3] fold"),
        {"gamma": normal(1, 6), "beta": normal(2, 6, 1, 1)},
    )
    apply_proven((FoldConstants(), InferShapes(), RaiseGroupNorm(), RemoveUnused()), model, GROUP_FEEDS)
    assert operators(model) == ["GroupNormalization"]
