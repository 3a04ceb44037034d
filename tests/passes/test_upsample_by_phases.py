"""A convolution of a doubled image as four of the image: the same function, in floating point and in integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from equality import FP32, apply_proven, make_model, operators, relative_error, run_model
from small_denoiser import measure_table, quantise_everything
from small_graphs import normal

from sdc.passes.base import PassReport, run_passes
from sdc.passes.macs import count_macs
from sdc.passes.memory.from_graph import buffers_from_graph
from sdc.passes.pipeline import BACKENDS, ORT_CUDA, canonical_passes, lowering_passes, precision_passes
from sdc.passes.precision.correct_bias import CorrectBias, dequantised_constant
from sdc.passes.precision.formats import Format
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.plan import uniform_plan
from sdc.passes.precision.range_rules import RangeRule
from sdc.passes.precision.upsample_by_phases import UpsampleByPhases, phase_kernel
from sdc.passes.precision.weight_qdq import quantise_weights
from sdc.passes.shapes.shape_rules import result_shape
from sdc.passes.simplify.remove_unused import RemoveUnused

REPEAT = 'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
SCALES = f"r = Resize <{REPEAT}> (x, , twice)"
SIZES = f"""
    batch_and_channels = Shape <end = 2> (x)  image = Shape <start = 2> (x)  doubled = Mul (image, two)
    wanted = Concat <axis = 0> (batch_and_channels, doubled)
    r = Resize <{REPEAT}> (x, , , wanted)
"""
CONV = "y = Conv <pads = [1, 1, 1, 1]> (r, w, b)"
SYMBOLS = ("B", "H", "W")
PHASES = list(product((0, 1), (0, 1)))
FEEDS = [{"x": normal(7, *shape)} for shape in ((2, 5, 3, 7), (1, 5, 1, 1), (3, 5, 6, 1))]
CALIBRATED = {"x": normal(9, 2, 5, 13, 17) + np.arange(-2, 3, dtype=np.float32).reshape(-1, 1, 1)}
"""Channels have means."""
PAIR = ["QuantizeLinear", "DequantizeLinear"]


def make(
    body: str = f"{SCALES} {CONV}",
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    sizes: tuple[int | str, ...] = SYMBOLS,
    channels: int = 5,
    more: str = "",
    outputs: str = "float[B2, M, H2, W2] y",
) -> ir.Model:
    """An upsampler from 5 to 7 channels, or a variation of it; `more` are further inputs."""
    batch, height, width = sizes
    text = f"""
        <ir_version: 10, opset_import: ["": 23]>
        upsampler (float[{batch}, {channels}, {height}, {width}] x{more}) => ({outputs})
        <float[4] twice = {{1.0, 1.0, 2.0, 2.0}}, float[4] thrice = {{1.0, 1.0, 3.0, 3.0}}, int64[1] two = {{2}},
         float[4] wider = {{1.0, 1.0, 1.0, 2.0}}, float[4] deeper = {{1.0, 2.0, 2.0, 2.0}}>
        {{ {body} }}
    """
    weights = {"w": normal(1, 7, 5, 3, 3), "b": normal(2, 7), **(weights or {})}
    read = {name: array for name, array in weights.items() if f"{name})" in body or f"{name}," in body}
    model = make_model(text, read)
    RemoveUnused().run(model)
    return model


def phases_of(model: ir.Model) -> list[ir.Node]:
    """The four convolutions."""
    return [node for node in model.graph if node.op_type == "Conv" and "phase" in (node.outputs[0].name or "")]


def convolve_doubled(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """As the definition says: the image repeated, and a sum over taps."""
    padded = np.pad(x.repeat(2, axis=2).repeat(2, axis=3), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.asarray(np.einsum("bchwij,ocij->bohw", windows, weight))


def interleave_phases(x: np.ndarray, kernels: Mapping[tuple[int, int], np.ndarray]) -> np.ndarray:
    """Four convolutions of the image, each written to the pixels of its parities."""
    batch, _, height, width = x.shape
    result = np.empty((batch, len(kernels[0, 0]), 2 * height, 2 * width), x.dtype)
    for (row, column), kernel in kernels.items():
        padded = np.pad(x, ((0, 0), (0, 0), (1 - row, row), (1 - column, column)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (2, 2), axis=(2, 3))
        result[:, :, row::2, column::2] = np.einsum("bchwij,ocij->bohw", windows, kernel)
    return result


@pytest.mark.parametrize("feeds", FEEDS)
def test_phases_are_the_convolution_in_float64(feeds: dict[str, np.ndarray]) -> None:
    x, weight = feeds["x"].astype(np.float64), normal(1, 7, 5, 3, 3).astype(np.float64)
    kernels = {phase: phase_kernel(weight, *phase) for phase in PHASES}
    wanted = convolve_doubled(x, weight)
    np.testing.assert_allclose(interleave_phases(x, kernels), wanted, rtol=0, atol=1e-14 * np.abs(wanted).max())


@pytest.mark.parametrize("bias", [True, False])
def test_four_convolutions_in_place_of_one(bias: bool) -> None:
    model = make() if bias else make(f"{SCALES} {CONV.replace(', b', '')}")
    model.graph[-1].name = "up"
    (report, _) = apply_proven([UpsampleByPhases(), RemoveUnused()], model, FEEDS)
    assert (report.matched, report.skipped) == (1, ())
    assert operators(model) == ["Conv"] * 4 + ["Concat", "DepthToSpace"]
    names = [f"phase{row}{column}" for row, column in PHASES]
    assert [node.name for node in model.graph] == [f"up.{name}" for name in (*names, "phases")] + ["up"]
    assert set(model.graph.initializers) == {f"w.{name}" for name in names} | ({"b"} if bias else set())
    assert [len(node.inputs) for node in phases_of(model)] == [3 if bias else 2] * 4


def test_shapes_and_types_are_stated() -> None:
    model = make()
    UpsampleByPhases().run(model)
    shapes = [[str(size) for size in node.outputs[0].shape or ()] for node in model.graph]
    assert shapes == [["B", "7", "H", "W"]] * 4 + [["B", "28", "H", "W"], ["B2", "M", "H2", "W2"]]  # as the output was
    assert [str(size) for size in result_shape(model.graph[-1], {}) or ()] == ["B", "7", "2*H", "2*W"]
    assert {node.outputs[0].dtype for node in model.graph} == {ir.DataType.FLOAT}


@pytest.mark.parametrize("sizes", [SYMBOLS, (2, 3, 7)])
@pytest.mark.parametrize("resize", [SCALES, SIZES])
def test_both_spellings_of_the_size(resize: str, sizes: tuple[int | str, ...]) -> None:
    model = make(f"{resize} {CONV}", sizes=sizes)
    expected = run_model(model, FEEDS[0])
    run_passes(canonical_passes(), model)  # sizes become expressions
    assert UpsampleByPhases().run(model).matched == 1
    assert relative_error(model, expected, FEEDS[0]) <= FP32


COORDINATES = ["asymmetric", "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners"]
ROUNDINGS = ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_repeats_pixels_matches_and_nothing_else(coordinates: str, rounding: str) -> None:
    resize = f'r = Resize <coordinate_transformation_mode = "{coordinates}", nearest_mode = "{rounding}"> (x, , twice)'
    alone = make(resize.replace("r =", "y ="))
    repeats = all(
        np.array_equal(run_model(alone, feeds)["y"], feeds["x"].repeat(2, axis=2).repeat(2, axis=3)) for feeds in FEEDS
    )
    model = make(f"{resize} {CONV}")
    assert UpsampleByPhases().run(model).matched == repeats
    if repeats:
        apply_proven(UpsampleByPhases(), make(f"{resize} {CONV}"), FEEDS)


def test_weight_stays_on_disk_until_it_is_written(tmp_path: Path) -> None:
    ir.save(make(), tmp_path / "model.onnx", external_data="model.onnx_data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "model.onnx")
    run_passes(precision_passes("fp32", backend="openvino"), model)
    kernels = [model.graph.initializers[f"w.phase{row}{column}"].const_value for row, column in PHASES]
    assert [type(tensor) for tensor in kernels] == [ir.LazyTensor] * 4
    for tensor, phase in zip(kernels, PHASES, strict=True):
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), phase_kernel(normal(1, 7, 5, 3, 3), *phase))


def test_weight_that_another_convolution_reads_stays() -> None:
    body = f"{SCALES} z = Conv <pads = [1, 1, 1, 1]> (x, w, b) {CONV}"
    model = make(body, outputs="float[B2, M, H2, W2] y, float[B3, N, H3, W3] z")
    apply_proven([UpsampleByPhases(), RemoveUnused()], model, FEEDS)
    assert {"w", "w.phase00"} <= set(model.graph.initializers)


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_kernels_are_cast_like_others(half: str) -> None:
    model, exact = make(), make()
    run_passes(precision_passes(half, backend="openvino"), model)
    dtype = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[half]
    assert {value.dtype for node in phases_of(model) for value in (*node.inputs, *node.outputs) if value} == {dtype}
    assert operators(model) == ["Cast"] + ["Conv"] * 4 + ["Concat", "DepthToSpace", "Cast"]
    if half == "fp16":  # ONNX Runtime has no bfloat16 on CPUs
        assert relative_error(model, run_model(exact, FEEDS[0]), FEEDS[0]) < 2e-3


def quantised(
    wanted: Format, *, bits: int = 8, symmetric: bool = True, correct: bool = False, channels: int = 5
) -> tuple[ir.Model, ir.Model, PassReport]:
    """The upsampler in a format before the pass and after it, with ranges and means of `CALIBRATED`."""
    model = make(weights={"w": normal(1, 7, channels, 3, 3)}, channels=channels)
    table = measure_table(model, {"x": CALIBRATED["x"] if channels == 5 else normal(9, 1, channels, 3, 7)})
    plan = uniform_plan(model, wanted, default=Format.FP32)
    plan = replace(plan, layers=tuple(replace(layer, format=wanted) for layer in plan.layers))  # whatever its role
    InsertQdq(table, plan, rule=RangeRule("max", symmetric=symmetric, weight_bits=bits)).run(model)
    before = model.clone()
    report = UpsampleByPhases().run(model)
    if correct:
        assert CorrectBias(table).run(model).matched == 4
    RemoveUnused().run(model)
    return before, model, report


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_those_of_the_sums(symmetric: bool) -> None:
    """The same 8-bit image, and kernels that are rounded once."""
    before, after, report = quantised(Format.INT8, symmetric=symmetric)
    assert (report.matched, report.skipped) == (1, ())
    assert operators(after) == PAIR + ["DequantizeLinear", "Conv"] * 4 + ["Concat", "DepthToSpace"]
    kernels = {}
    for phase, conv in zip(PHASES, phases_of(after), strict=True):
        integers, scale = quantise_weights(phase_kernel(normal(1, 7, 5, 3, 3), *phase), levels=127, axis=0)
        dequantise = conv.inputs[1].producer()
        stored = [value.const_value.numpy() for value in dequantise.inputs]
        np.testing.assert_array_equal(stored[0], integers)
        np.testing.assert_array_equal(stored[1], scale)
        kernels[phase] = dequantised_constant(dequantise)
    quantise, dequantise = (next(node for node in after.graph if node.op_type == name) for name in PAIR)
    assert quantise.inputs[0] is after.graph.inputs[0]
    scale, zero = (value.const_value.numpy() for value in quantise.inputs[1:])
    for feeds in FEEDS:
        codes = np.clip(np.round(feeds["x"] / scale) + zero, -128, 127)
        image = (codes - zero) * np.float64(scale)
        wanted = interleave_phases(image, kernels) + normal(2, 7).reshape(-1, 1, 1)
        found = run_model(after, feeds)["y"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    assert dequantise.outputs[0].shape == after.graph.inputs[0].shape
    assert [value.name for value in quantise.inputs[1:]] == [
        value.name for value in next(node for node in before.graph if node.op_type == "QuantizeLinear").inputs[1:]
    ]


@pytest.mark.parametrize("wanted", [Format.INT8, Format.W8])
def test_error_of_rounding_is_bounded(wanted: Format) -> None:
    before, after, report = quantised(wanted)
    assert report.matched == 1
    assert operators(after).count("QuantizeLinear") == (wanted is Format.INT8)
    exact = run_model(make(), CALIBRATED)["y"]
    errors = [np.square(run_model(each, CALIBRATED)["y"] - exact).mean() for each in (before, after)]
    # Sums of independent taps are up to twice as large, and four are rounded where there were nine.
    assert 0 < errors[1] < 16 / 9 * errors[0]


def test_as_many_levels_as_before() -> None:
    _, model, _ = quantised(Format.W8, bits=3)
    integers = [node.inputs[1].producer().inputs[0].const_value.numpy() for node in phases_of(model)]
    assert [np.abs(each).max() for each in integers] == [3] * 4


def test_biases_are_corrected_by_the_new_integers() -> None:
    exact = run_model(make(), CALIBRATED)["y"]
    errors = {}
    for correct in (False, True):
        _, model, _ = quantised(Format.INT8, bits=3, correct=correct)
        found = run_model(model, CALIBRATED)["y"] - exact
        # Each phase by itself: each has a bias of its own. At the border, padding stands for a part of the mean.
        inside = [found[:, :, 2 + row : -2 : 2, 2 + column : -2 : 2] for row, column in PHASES]
        errors[correct] = [np.abs(each.mean(axis=(0, 2, 3))).max() for each in inside]
    for without, corrected in zip(errors[False], errors[True], strict=True):
        assert corrected < 0.2 * without


def test_image_that_another_layer_rounds_too_has_two_pairs() -> None:
    body = f"{SCALES} z = Conv (x, u) {CONV}"
    model = make(body, {"u": normal(3, 4, 5, 1, 1)}, outputs="float[B2, M, H2, W2] y, float[B3, N, H3, W3] z")
    quantise_everything(model, measure_table(model, FEEDS[0]))
    expected = run_model(model, FEEDS[0])
    assert UpsampleByPhases().run(model).matched == 1
    assert operators(model).count("QuantizeLinear") == 2
    assert relative_error(model, expected, FEEDS[0]) < 0.02


LEFT = {
    "interpolated": (SCALES.replace('nearest", c', 'linear", c'), CONV, "it interpolates (linear)"),
    "three times": (SCALES.replace("twice", "thrice"), CONV, "not known to be doubled"),
    "columns alone": (SCALES.replace("twice", "wider"), CONV, "not known to be doubled"),
    "channels too": (SCALES.replace("twice", "deeper"), CONV.replace("w, b", "w10"), "not known to be doubled"),
    "computed scales": (f"scales = Abs (twice) {SCALES.replace('twice', 'scales')}", CONV, "not known to be doubled"),
    "axes": (SCALES.replace(">", ", axes = [0, 1, 2, 3]>"), CONV, "axes or a policy of its own"),
    "another reader": (SCALES, f"m = ReduceMean (r)  y0 = {CONV[4:]}  y = Add (y0, m)", "by something else"),
    "no convolution": (SCALES, "y = Neg (r)", "by something else"),
    "as the weight": (SCALES, "y = Conv <pads = [1, 1, 1, 1]> (k, r)", "by something else"),
    "strides": (SCALES, CONV.replace(">", ", strides = [2, 2]>"), "strides [2, 2]"),
    "dilations": (SCALES, CONV.replace(">", ", dilations = [2, 2]>"), "dilations [2, 2]"),
    "padding": (SCALES, CONV.replace("[1, 1, 1, 1]", "[0, 0, 2, 2]"), "pads [0, 0, 2, 2]"),
    "automatic padding": (SCALES, CONV.replace("pads = [1, 1, 1, 1]", 'auto_pad = "SAME_UPPER"'), "pads [0, 0, 0, 0]"),
    "groups": (SCALES, CONV.replace(">", ", group = 5>").replace("w, b", "grouped"), "5 groups"),
    "five taps": (SCALES, CONV.replace("w, b", "w5"), "a kernel of (5, 5)"),
    "computed weight": (f"n = Neg (w) {SCALES}", CONV.replace("w,", "n,"), "is computed"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_says_why(name: str) -> None:
    resize, rest, reason = LEFT[name]
    others = {"w10": normal(4, 7, 10, 3, 3), "grouped": normal(5, 5, 1, 3, 3), "w5": normal(6, 7, 5, 5, 5)}
    model = make(f"{resize} {rest}", others | {"k": normal(8, 2, 5, 3, 3)})
    before = operators(model)
    report = UpsampleByPhases().run(model)
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True], report.skipped
    assert operators(model) == before


def test_result_that_is_an_output_too_is_left() -> None:
    report = UpsampleByPhases().run(make(outputs="float[B2, M, H2, W2] y, float[B3, N, H3, W3] r"))
    assert ["by something else" in each.reason for each in report.skipped] == [True]


@pytest.mark.parametrize(("columns", "matched"), [(14, 1), (7, 0), (15, 0)])
def test_sizes_have_to_be_the_double(columns: int, matched: int) -> None:
    body = f"r = Resize <{REPEAT}> (x, , , wanted) {CONV}"
    model = make(body, {"wanted": np.array([2, 5, 6, columns])}, sizes=(2, 3, 7))
    report = UpsampleByPhases().run(model)
    assert (report.matched, len(report.skipped)) == (matched, 1 - matched)


def test_free_sizes_are_not_taken_for_the_double() -> None:
    model = make(f"wanted = Shape (z)  r = Resize <{REPEAT}> (x, , , wanted) {CONV}", more=", float[B, 5, P, Q] z")
    run_passes(canonical_passes(), model)
    report = UpsampleByPhases().run(model)
    assert ["not known to be doubled" in each.reason for each in report.skipped] == [True]


@pytest.mark.parametrize("name", ["r", "y"])
def test_nodes_that_keep_a_type_of_their_own_are_left(name: str) -> None:
    model = make()
    reports = run_passes(precision_passes("fp16", float32=frozenset({name}), backend="openvino"), model)
    assert operators(model).count("Resize") == 1
    assert ["floating-point type of its own" in each.reason for each in reports[0].skipped] == [True]


@pytest.mark.parametrize(("wanted", "reason"), [(Format.W4, "stored in blocks"), (Format.FP8, "is FLOAT8E4M3FN")])
def test_formats_that_are_left(wanted: Format, reason: str) -> None:
    _, model, report = quantised(wanted, channels=32)
    assert report.matched == 0
    assert [reason in each.reason for each in report.skipped] == [True], report.skipped
    assert operators(model).count("Conv") == 1


def test_integers_of_another_process_are_left() -> None:
    before, _, _ = quantised(Format.INT8)
    for node in before.graph:
        node.meta.clear()
    report = UpsampleByPhases().run(before)
    assert ["int8 made from it here" in each.reason for each in report.skipped] == [True]


def test_pair_that_another_layer_reads_is_left() -> None:
    body = f"{SCALES} {CONV} z = Conv (r, u)"
    model = make(body, {"u": normal(3, 4, 5, 1, 1)}, outputs="float[B2, M, H2, W2] y, float[B3, N, H3, W3] z")
    quantise_everything(model, measure_table(model, FEEDS[0]))
    report = UpsampleByPhases().run(model)
    assert ["by something else" in each.reason for each in report.skipped] == [True]


def test_openvino_alone_between_integers_and_their_correction() -> None:
    table = measure_table(make(), FEEDS[0])
    for backend in (*BACKENDS, ORT_CUDA, None):
        passes = precision_passes("int8", quantise=(InsertQdq(table),), correct=(CorrectBias(table),), backend=backend)
        wanted = ["upsample-by-phases"] if backend == "openvino" else []
        names = [each.name for each in passes]
        assert names[: len(wanted) + 3] == ["insert-qdq", *wanted, "correct-bias", "cast-fp16"]


def test_work_and_memory_follow() -> None:
    sizes = {"B": 2, "H": 11, "W": 13}
    plain, phased = make(), make()
    run_passes((*precision_passes("fp32", backend="openvino"), *lowering_passes("openvino")), phased)
    assert 9 * count_macs(phased, sizes).total == 4 * count_macs(plain, sizes).total
    assert len(count_macs(phased, sizes).products) == 4
    buffers = {each.name: str(each.elements) for each in buffers_from_graph(phased).buffers}
    assert buffers["y"] == "28*B*H*W"
    assert sorted(buffers.values()) == ["28*B*H*W"] * 2 + ["7*B*H*W"] * 4
