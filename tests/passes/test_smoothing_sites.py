"""Images that SmoothQuant scales at the convolutions that write them: which they are, and the same function."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from equality import apply_proven, make_model
from small_denoiser import measure_table, quantise_everything
from small_denoiser import run_model as run

from sdc.passes.graph_digest import digest_from_model
from sdc.passes.precision.calibration_table import Smoothing
from sdc.passes.precision.quantisation import find_layers
from sdc.passes.precision.smooth_quant import SmoothQuant
from sdc.passes.precision.smoothing_rule import SmoothingRule
from sdc.passes.precision.smoothing_sites import find_sites

EVERY_CHANNEL = SmoothingRule(outlier_ratio=1)

SUM = "a = Conv <pads = [1, 1, 1, 1]> (x, w, b)  c = Conv (s, u)  i = Add (a, c)"
NEAREST = '<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">'
READ = "y = Conv <pads = [1, 1, 1, 1]> (r, v)"
UPSAMPLER = f"{SUM}  r = Resize {NEAREST} (i, , twice)  {READ}"
"""A block's end, convolution and shortcut, and the upsampler behind it."""

PICTURE = "float[B, C, H, W] y"
NOT_SPATIAL = "Resize of other axes than the picture's"

CONSTANTS = {
    "w": (6, 4, 3, 3),
    "b": (6,),
    "u": (6, 3, 1, 1),
    "v": (5, 6, 3, 3),
    "halves": (6, 2, 3, 3),
    "one": (1, 4, 3, 3),
    "square": (6, 6, 1, 1),
    "m": (7, 5),
    "wide": (6, 4, 2, 3),
    "line": (6, 3, 1),
    "dozen": (5, 12, 1, 1),
    "g": (6,),
    "last": (7,),
}
SCALES = {"twice": [1, 1, 2, 2], "planes": [2, 2], "channels_too": [1, 0.5, 2, 2]}
INPUTS = {"x": (2, 4, 5, 7), "s": (2, 3, 5, 7), "z": (2, 6, 5, 7), "row": (6, 3, 7), "f": (6,), "k": (6, 4, 3, 3)}


def draw(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


FEEDS = draw(103, INPUTS)


def make(body: str, outputs: str = PICTURE, *, known: str = "") -> ir.Model:
    """A graph of these nodes; `known` are values whose shapes inference does not find."""
    inputs = ", ".join(f"float{list(shape)} {name}" for name, shape in INPUTS.items())
    weights = draw(107, CONSTANTS) | {name: np.array(numbers, np.float32) for name, numbers in SCALES.items()}
    read = set(re.findall(r"\w+", body))
    text = f'<ir_version: 10, opset_import: ["": 23]> g ({inputs}) => ({outputs}) <{known}> {{ {body} }}'
    return make_model(text, {name: array for name, array in weights.items() if name in read})


def make_upsampler() -> ir.Model:
    return make(UPSAMPLER)


def smoothing_of(model: ir.Model) -> Smoothing:
    random = np.random.default_rng(109)
    layers, _ = find_layers(model)
    spread = {each.activation.name or "": tuple(np.exp(random.normal(0, 2, each.channels))) for each in layers}
    return Smoothing(digest_from_model(model), EVERY_CHANNEL, spread)


def reason_of(model: ir.Model, output: str = "y") -> str | None:
    """Why what the layer that writes `output` reads is no site; None if it is one."""
    layers, _ = find_layers(model)
    layer = next(each for each in layers if each.node.outputs[0].name == output)
    sites, skipped = find_sites(layers)
    if any(each.tensor is layer.activation for each in sites):
        return None
    return next(each.reason for each in skipped if each.site == (layer.node.name or f"{layer.node.op_type}({output})"))


def test_the_end_of_a_block_before_an_upsampler_is_scaled_as_one():
    model = make_upsampler()
    (report,) = apply_proven(SmoothQuant(smoothing_of(model)), model, [FEEDS])
    assert report.matched == 1
    scaled = {value.name for node in model.graph for value in node.inputs if value and "smoothed" in (value.name or "")}
    assert scaled == {f"{name}.smoothed" for name in ("w", "b", "u", "v")}


@pytest.mark.parametrize(
    "body",
    [
        f"r = Conv (x, w)  {READ}",
        f"r = Conv <group = 2> (x, halves, b)  {READ}",
        f"{SUM}  r = Add (i, i)  {READ}",
        f"{SUM}  d = Conv (z, square)  r = Add (d, i)  {READ}",
        f'{SUM}  r = Resize <mode = "linear"> (i, , twice)  {READ}',
        f"{SUM}  r = Resize <axes = [2, 3]> (i, , planes)  {READ}",
        f"{SUM}  r = Resize (i, , twice)  {READ}  t = Conv (r, square)",
    ],
    ids=["conv", "groups", "twice", "three", "linear", "axes", "two-readers"],
)
def test_channels_that_are_kept_apart_are_scaled(body: str):
    model = make(body, PICTURE + (", float[B, E, H, W] t" if " t = " in body else ""))
    assert reason_of(model) is None
    (report,) = apply_proven(SmoothQuant(smoothing_of(model)), model, [FEEDS])
    assert report.matched == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{SUM}  r = Add (i, z)  {READ}", "an input of the graph"),
        (f"{SUM}  e = Neg (z)  r = Add (i, e)  {READ}", "behind Neg, which is not linear"),
        (f"{SUM}  e = Conv (x, one)  q = Conv (z, square)  r = Add (q, e)  {READ}", "may have other channels"),
        (f"e = Conv (row, line)  q = Conv <pads = [1, 1, 1, 1]> (x, wide)  r = Add (q, e)  {READ}", "may have other"),
        (f"{SUM}  r = Resize (i, , channels_too)  y = Conv (r, u)", NOT_SPATIAL),
        (f"{SUM}  r = Resize <axes = [1, 2]> (i, , planes)  y = Conv (r, dozen)", NOT_SPATIAL),
        (f"o = Conv (x, k)  r = Resize (o, , twice)  {READ}", "weight or bias is not constant"),
        (f"o = Conv (x, w, f)  r = Resize (o, , twice)  {READ}", "weight or bias is not constant"),
        (f"{SUM}  r = Relu (i)  {READ}", "behind Relu, which is not linear"),
        ("r = Conv <pads = [1, 1, 1, 1]> (x, w)  y = MatMul (r, m)", "behind Conv, which is not linear"),
        (
            "r = GroupNormalization <num_groups = 2> (z, g, b)  y = MatMul (r, m)",
            "behind GroupNormalization, which is not linear",
        ),
        ("r = LayerNormalization (z, last)  y = Conv (r, v)", "behind LayerNormalization, which is not linear"),
    ],
)
def test_what_is_no_site(body: str, reason: str):
    found = reason_of(make(body))
    assert found is not None
    assert reason in found


def test_a_sum_with_a_normalised_image_is_a_site():
    body = f"{SUM}  d = GroupNormalization <num_groups = 2> (z, g, b)  r = Add (d, i)  {READ}"
    model = make(body, known="float[2, 6, 5, 7] d")
    (report,) = apply_proven(SmoothQuant(smoothing_of(model)), model, [FEEDS])
    assert report.matched == 1
    assert reason_of(make(body)) == "Add of what may have other channels"


def test_an_image_that_is_cut_is_no_site():
    cut = '<coordinate_transformation_mode = "tf_crop_and_resize", extrapolation_value = 3.0>'
    assert (
        reason_of(make(f"{SUM}  r = Resize {cut} (i, f, twice)  {READ}")) == "Resize of other axes than the picture's"
    )


def test_a_size_that_is_computed_is_no_site():
    assert reason_of(make(f"{SUM}  d = Shape (x)  r = Resize (i, , , d)  y = Conv (r, w)")) == NOT_SPATIAL


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("i", "Resize of what something else reads too"),
        ("a", "Add of what something else reads too"),
        ("r", "something else reads it too"),
    ],
)
def test_other_readers_prevent_it(value: str, reason: str):
    assert reason_of(make(f"{UPSAMPLER}  t = Neg ({value})", f"{PICTURE}, float[B, E, F, G] t")) == reason
    if value != "r":
        assert reason_of(make(UPSAMPLER, f"{PICTURE}, float[2, 6, 5, 7] {value}")) == reason


def test_layers_along_different_axes_prevent_it():
    body = f"r = Conv <pads = [1, 1, 1, 1]> (x, w)  {READ}  t = MatMul (r, m)"
    assert (
        reason_of(make(body, f"{PICTURE}, float[B, E, F, G] t")) == "layers that take its channels from different axes"
    )


def test_planted_outliers_leave_no_trace():
    damage = {}
    for planted in (False, True):
        for smooth in (False, True):
            model = make_upsampler()
            if planted:
                _plant(model)
            (exact,) = run(model, FEEDS)
            if smooth:
                seen = measure_table(model, FEEDS).tensors
                magnitudes = {name: tuple(each.channel_magnitudes.tolist()) for name, each in seen.items()}
                SmoothQuant(Smoothing(digest_from_model(model), SmoothingRule(), magnitudes)).run(model)
            quantise_everything(model, measure_table(model, FEEDS))
            (found,) = run(model, FEEDS)
            damage[planted, smooth] = float(np.sqrt(np.mean(np.square(found - exact))))
    # A decibel is 12 %.
    assert damage[True, False] > 2 * damage[False, False], "the outliers hurt nothing: recovery would prove nothing"
    assert damage[True, True] < 1.12 * damage[False, True]


def _plant(model: ir.Model) -> None:
    for channel, factor in zip((1, 4), (50, 200), strict=True):
        for name, axis, by in (("w", 0, factor), ("b", 0, factor), ("u", 0, factor), ("v", 1, 1 / factor)):
            value = model.graph.initializers[name]
            assert value.const_value is not None
            array = value.const_value.numpy().copy()
            np.moveaxis(array, axis, 0)[channel] *= by
            value.const_value = ir.tensor(array, name=name)
