"""A UNet in three graphs: together they compute what the one did, and what cannot leave stays."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from equality import FP32, make_model, operators, run_model
from exported_graphs import feed, load_graph
from small_denoiser import make_table
from small_graphs import normal

from sdc.engines.errors import PassError
from sdc.passes.base import run_passes
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.hoisting.hoist import PROMPT, TIMESTEP, Hoisted, hoist
from sdc.passes.pipeline import BACKENDS, canonical_passes, fusion_passes, lowering_passes, precision_passes
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.quantisation import find_layers

FP16 = 5e-3
"""Hundreds of operators in a row, each of which rounds to 2^-11; a row alone and in a batch may round differently."""

SIZES = [{}, {"batch": 1, "height": 4, "width": 20}, {"batch": 2, "height": 16, "width": 8}]

UNET = """
<ir_version: 10, opset_import: ["": 23]>
unet (float[B, 6, H, W] sample, float[1] timestep, float[B, 7, 9] states, float[B, 4] condition)
    => (float[B, 6, H, W] out_sample, float[B, 5] extra)
<int64[1] last = {1}, int64[2] planes = {2, 3}>
{
    rows = Shape <start = 0, end = 1> (sample)
    times = Expand (timestep, rows)
    column = Unsqueeze (times, last)
    angles = Mul (column, frequencies)
    sines = Sin (angles)
    guided = MatMul (condition, w_condition)
    embedded = Add (sines, guided)
    time = Gemm (embedded, w_time, b_time)
    shift = Unsqueeze (time, planes)
    text = ReduceMean <keepdims = 0> (states, last)
    key = MatMul (text, w_key)
    extra = Tanh (key)
    projected = MatMul (extra, w_extra)
    bias = Unsqueeze (projected, planes)
    first = Conv <pads = [1, 1, 1, 1]> (sample, w_conv)
    second = Add (first, shift)
    out_sample = Add (second, bias)
}
"""
"""The parts of a UNet that matter here, with odd and distinct sizes: a guidance condition for each row, and an output
that depends on the prompt alone."""


def make_unet(text: str = UNET) -> ir.Model:
    """`UNET`, or a variation of it."""
    weights = {
        "frequencies": np.linspace(0.001, 0.02, 8, dtype=np.float32)[None],
        "w_condition": normal(1, 4, 8),
        "w_time": normal(2, 8, 6),
        "b_time": normal(3, 6),
        "w_key": normal(4, 9, 5),
        "w_extra": normal(5, 5, 6),
        "w_conv": normal(6, 6, 6, 3, 3) / 5,
    }
    return make_model(text, {name: each for name, each in weights.items() if re.search(rf"\b{name}\b", text)})


def feed_unet(*, batch: int = 3, height: int = 5, width: int = 7) -> dict[str, np.ndarray]:
    return {
        "sample": normal(10, batch, 6, height, width),
        "timestep": np.array([731], np.float32),
        "states": normal(11, batch, 7, 9),
        "condition": normal(12, batch, 4),
    }


def vary(*replacements: tuple[str, str]) -> ir.Model:
    text = UNET
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return make_unet(text)


def at_another_step(part: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Feeds of another call, with which a part's result is used as well: of another timestep, or another prompt."""
    own = (3,) if part == PROMPT else (1, 2)
    return {name: value if value.ndim in own else value + np.float32(0.5) for name, value in feeds.items()}


def run_all(rest: ir.Model, parts: dict[str, ir.Model], feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the runtime does: each part first, for other calls too, then the rest with what they give."""
    values = dict(feeds)
    for part, graph in parts.items():
        other = at_another_step(part, feeds)
        values |= run_model(graph, {value.name or "": other[value.name or ""] for value in graph.graph.inputs})
    return run_model(rest, {value.name or "": values[value.name or ""] for value in rest.graph.inputs})


def hoist_proven(model: ir.Model, feeds: list[dict[str, np.ndarray]], *, tolerance: float = FP32) -> Hoisted:
    """Hoist; fail unless all graphs are valid, share no weight, and together equal the one."""
    expected = [run_model(model, each) for each in feeds]
    hoisted = hoist(model)
    graphs = [model, *hoisted.parts.values()]
    for each in graphs:
        onnx.checker.check_model(ir.to_proto(each))
    holders = Counter(
        name
        for each in graphs
        for name, value in each.graph.initializers.items()
        if value.const_value is not None and value.const_value.size > 8
    )
    assert all(count == 1 for count in holders.values()), holders
    for part in hoisted.parts.values():
        for value in (*part.graph.inputs, *part.graph.outputs):
            assert value.dtype == ir.DataType.FLOAT
    for each, wanted in zip(feeds, expected, strict=True):
        found = run_all(model, dict(hoisted.parts), each)
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            assert np.std(value) > 0
            assert np.abs(found[name] - value).max() <= tolerance * np.abs(value).max(), f"{name}: not equal"
    return hoisted


def shapes(values: list[ir.Value]) -> dict[str, str]:
    return {value.name or "": str(value.shape) for value in values}


@cache
def calibrated() -> tuple[str, dict[str, float]]:
    model = load_graph("unet")
    run_passes((*canonical_passes(), *fusion_passes("unet")), model)
    layers, _ = find_layers(model)
    return digest_from_model(model), {layer.activation.name or "": 4.0 for layer in layers}


def typed_unet(precision: str, *, fuse: bool = True, remainder: str = "fp16") -> ir.Model:
    model = load_graph("unet")
    run_passes((*canonical_passes(), *(fusion_passes("unet") if fuse else ())), model)
    quantise = ()
    if precision == "int8":
        digest, ranges = calibrated()
        quantise = (InsertQdq(replace(make_table(model, dict(ranges)), graph_digest=digest)),)
    run_passes(precision_passes(precision, quantise=quantise, remainder=remainder), model)
    return model


@pytest.mark.parametrize(
    ("precision", "fuse", "remainder", "tolerance"),
    [
        ("fp32", True, "fp16", FP32),
        ("fp32", False, "fp16", FP32),
        ("fp16", True, "fp16", FP16),
        # The ranges are wide: a value next to the border of two integers may fall to either side.
        ("int8", True, "fp32", 5e-2),
        ("int8", True, "fp16", 1e-1),
    ],
)
def test_small_unet_equals_its_three_graphs(precision: str, fuse: bool, remainder: str, tolerance: float) -> None:
    model = typed_unet(precision, fuse=fuse, remainder=remainder)
    hoisted = hoist_proven(model, [feed("unet", **size) for size in SIZES], tolerance=tolerance)
    assert list(hoisted.parts) == [PROMPT, TIMESTEP]
    prompt, timestep = hoisted.parts.values()
    assert shapes(list(prompt.graph.inputs)) == {"encoder_hidden_states": "[B,77,64]"}
    assert shapes(list(timestep.graph.inputs)) == {"timestep": "[1]"}
    keys = "[B,77,64]" if fuse else "[B,4,77,16]"
    assert shapes(list(prompt.graph.outputs))["prompt.0"] == keys
    assert shapes(list(timestep.graph.outputs)) == {"timestep.0": "[1,1696,1,1]"}
    crossing = [f"prompt.{index}" for index in range(22)] + ["timestep.0"]
    assert [value.name for value in model.graph.inputs] == ["sample", *crossing]
    work = [Counter(operators(each)) for each in (prompt, timestep, model)]
    assert [(each["MatMul"], each["Gemm"]) for each in work] == [(22, 0), (0, 19), (88, 0)]
    assert hoisted.report.details is not None
    assert hoisted.report.details[PROMPT]["tensors"] == 22
    assert not hoisted.report.skipped


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_graph_can_be_lowered_by_itself(backend: str) -> None:
    model = typed_unet("fp32")
    feeds = feed("unet")
    expected = run_model(model, feeds)["out_sample"]
    hoisted = hoist(model)
    for each in (model, *hoisted.parts.values()):
        run_passes(lowering_passes(backend), each)
    found = run_all(model, dict(hoisted.parts), feeds)["out_sample"]
    assert np.abs(found - expected).max() <= FP32 * np.abs(expected).max()


def test_equal_graphs_are_cut_alike_in_every_precision() -> None:
    interfaces = []
    for precision, remainder in (("fp32", "fp16"), ("fp16", "fp16"), ("int8", "fp16"), ("int8", "fp32")):
        model = typed_unet(precision, remainder=remainder)
        parts = hoist(model).parts
        interfaces.append([shapes(list(graph.graph.outputs)) for graph in parts.values()])
    assert all(each == interfaces[0] for each in interfaces)


def test_a_hoisted_unet_has_nothing_left_to_hoist() -> None:
    """Its inputs are what left: sequences and vectors that are not worth an engine."""
    model = typed_unet("fp32")
    hoist(model)
    before = operators(model)
    again = hoist(model)
    assert not again.parts
    assert again.report.matched == 0
    assert "no arithmetic" in again.report.skipped[0].reason
    assert operators(model) == before


def test_conditions_of_each_row_stay_rows_and_an_output_is_passed_through() -> None:
    model = make_unet()
    hoisted = hoist_proven(model, [feed_unet(), feed_unet(batch=1, height=4), feed_unet(batch=5)])
    assert shapes(list(model.graph.inputs)) == {
        "sample": "[B,6,H,W]",
        "prompt.0": "[B,5]",
        "prompt.1": "[B,6,1,1]",
        "timestep.0": "[B,6,1,1]",
    }
    assert shapes(list(model.graph.outputs)) == {"out_sample": "[B,6,H,W]", "extra": "[B,5]"}
    timestep = hoisted.parts[TIMESTEP]
    assert list(shapes(list(timestep.graph.inputs))) == ["timestep", "condition"]
    assert operators(timestep) == ["Unsqueeze", "Mul", "Sin", "MatMul", "Add", "Gemm", "Unsqueeze"]
    assert operators(model) == ["Conv", "Add", "Add", "Identity"]


def test_values_of_a_timestep_that_differ_in_their_channels_cross_as_one() -> None:
    model = vary(
        ("planes = {2, 3}>", "planes = {2, 3}, int64[3] bare = {6, 1, 1}>"),
        (
            "second = Add (first, shift)",
            "top = ReduceMax <keepdims = 1> (time, last) level = Unsqueeze (top, planes) waves = Sin (time) "
            "alone = Mul (timestep, frequencies) weighed = Gemm (alone, w_time) other = Reshape (weighed, bare) "
            "gain = Unsqueeze (waves, planes) moved = Add (first, shift) raised = Add (moved, level) "
            "added = Add (raised, other) second = Mul (added, gain)",
        ),
    )
    hoisted = hoist_proven(model, [feed_unet(), feed_unet(batch=1, height=4), feed_unet(batch=5)])
    outputs = shapes(list(hoisted.parts[TIMESTEP].graph.outputs))
    assert outputs == {"timestep.0": "[B,13,1,1]", "timestep.1": "[6,1,1]"}
    (split,) = (node for node in model.graph if node.op_type == "Split")
    assert [str(value.shape) for value in split.outputs] == ["[B,6,1,1]", "[B,1,1,1]", "[B,6,1,1]"]


def test_one_row_is_repeated_for_a_reader_that_does_not_broadcast() -> None:
    model = vary(
        ("    embedded = Add (sines, guided)\n", "    embedded = Sin (sines)\n"),
        (
            "second = Add (first, shift)",
            "twice = Concat <axis = 0> (shift, shift)\n    thin = ReduceMean (twice)\n    second = Add (first, thin)",
        ),
    )
    hoisted = hoist_proven(model, [feed_unet(), feed_unet(batch=4)])
    assert shapes(list(hoisted.parts[TIMESTEP].graph.outputs)) == {"timestep.0": "[1,6,1,1]"}
    assert "Expand" in operators(model)
    assert [each.reason for each in hoisted.report.skipped] == ["Concat may mix the rows of a batch"]


def test_an_output_of_one_row_gets_its_rows_back() -> None:
    model = vary(
        ("embedded = Add (sines, guided)", "embedded = Sin (sines)"),
        ("float[B, 5] extra", "float[B, 6] time"),
    )
    hoist_proven(model, [feed_unet(), feed_unet(batch=4)])
    assert shapes(list(model.graph.outputs))["time"] == "[B,6]"
    assert {"Expand", "Identity"} <= set(operators(model))


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("mixed = Softmax <axis = 0> (sines)", "Softmax may mix"),
        ("mixed = LpNormalization <axis = 0> (sines)", "LpNormalization may mix"),
        ("turned = Transpose (sines)\n    mixed = Transpose (turned)", "Transpose may mix"),
        (
            "tall = Concat <axis = -2> (sines, guided)\n    mixed, rest = Split <num_outputs = 2> (tall)",
            "Concat may mix",
        ),
        ("flat = Reshape (sines, all)\n    eight = Reshape (flat, back)\n    mixed = Sin (eight)", "Reshape may mix"),
    ],
)
def test_a_node_that_mixes_rows_stays(lines: str, reason: str) -> None:
    model = vary(
        ("embedded = Add (sines, guided)", f"{lines}\n    embedded = Sin (mixed)"),
        ("<int64[1] last = {1},", "<int64[1] all = {-1}, int64[2] back = {-1, 8}, int64[1] last = {1},"),
    )
    hoisted = hoist_proven(model, [feed_unet(), feed_unet(batch=2)])
    assert [each.reason.split(" the")[0] for each in hoisted.report.skipped] == [reason]
    assert operators(model).count("Gemm") == 1


def test_what_depends_on_both_stays() -> None:
    model = vary(("key = MatMul (text, w_key)", "scaled = Mul (text, timestep)\n    key = MatMul (scaled, w_key)"))
    hoisted = hoist_proven(model, [feed_unet()])
    assert operators(hoisted.parts[PROMPT]) == ["ReduceMean"]
    assert "timestep" in shapes(list(model.graph.inputs))


def test_a_size_of_the_sample_keeps_a_node_where_it_is() -> None:
    model = vary(
        (
            "key = MatMul (text, w_key)",
            "both = Concat <axis = 0> (rows, nine)\n    shaped = Reshape (text, both)\n"
            "    key = MatMul (shaped, w_key)",
        ),
        ("<int64[1] last = {1},", "<int64[1] nine = {9}, int64[1] last = {1},"),
    )
    hoisted = hoist_proven(model, [feed_unet()])
    assert shapes(list(hoisted.parts[PROMPT].graph.outputs)) == {"prompt.0": "[B,9]"}
    assert any("a size that it needs" in each.reason for each in hoisted.report.skipped)


def test_what_only_blows_up_stays_with_its_readers() -> None:
    model = vary(
        (
            "bias = Unsqueeze (projected, planes)",
            "thin = Unsqueeze (projected, planes)\n    bias = Tile (thin, repeats)",
        ),
        ("<int64[1] last = {1},", "<int64[4] repeats = {1, 1, 5, 1}, int64[1] last = {1},"),
    )
    hoisted = hoist_proven(model, [feed_unet(), feed_unet(batch=2)])
    assert "Tile" in operators(model)
    assert shapes(list(hoisted.parts[PROMPT].graph.outputs)) == {"prompt.0": "[B,5]", "prompt.1": "[B,6,1,1]"}


def test_what_is_blown_up_for_a_node_that_leaves_goes_with_it() -> None:
    model = vary(
        (
            "bias = Unsqueeze (projected, planes)",
            "thin = Unsqueeze (projected, planes)\n    wide = Tile (thin, repeats)\n"
            "    bias = ReduceMax (wide, planes)",
        ),
        ("<int64[1] last = {1},", "<int64[4] repeats = {1, 1, 5, 1}, int64[1] last = {1},"),
    )
    hoisted = hoist_proven(model, [feed_unet()])
    assert "Tile" in operators(hoisted.parts[PROMPT])


def test_a_cast_from_float32_stays_and_the_interface_keeps_float32() -> None:
    model = vary(
        (
            "out_sample = Add (second, bias)",
            "small = Cast <to = 10> (second)\n    narrow = Cast <to = 10> (bias)\n"
            "    sum = Add (small, narrow)\n    out_sample = Cast <to = 1> (sum)",
        ),
    )
    hoist_proven(model, [feed_unet()], tolerance=FP16)
    assert operators(model).count("Cast") == 3


def test_casts_and_layout_alone_are_not_worth_an_engine() -> None:
    model = make_model(
        """
        <ir_version: 10, opset_import: ["": 23]>
        unet (float[B, 6, H, W] sample, float[1] timestep, float[B, 6, 1] states) => (float[B, 6, H, W] y)
        <int64[1] last = {3}, int64[1] first = {0}>
        {
            half = Cast <to = 10> (states)
            full = Cast <to = 1> (half)
            bias = Unsqueeze (full, last)
            shifted = Add (sample, bias)
            y = Mul (shifted, timestep)
        }""",
        {},
    )
    before = operators(model)
    hoisted = hoist(model)
    assert not hoisted.parts
    assert operators(model) == before
    assert list(shapes(list(model.graph.inputs))) == ["sample", "timestep", "states"]


def test_refuses_what_it_cannot_describe() -> None:
    model = make_unet()
    model.graph.inputs[2].shape = None
    with pytest.raises(PassError, match="'states' has no known rank"):
        hoist(model)
    model = make_unet()
    next(node for node in model.graph if node.outputs[0].name == "bias").outputs[0].shape = None
    with pytest.raises(PassError, match="the shape of 'bias' is unknown"):
        hoist(model)


def test_names_that_are_taken_are_left_out() -> None:
    model = vary(("second = Add (first, shift)", "prompt_0 = Add (first, shift)"), ("Add (second", "Add (prompt_0"))
    next(node for node in model.graph if node.outputs[0].name == "prompt_0").outputs[0].name = "prompt.0"
    hoist_proven(model, [feed_unet()])
    assert "prompt.0" not in shapes(list(model.graph.inputs))
    assert "prompt.1" in shapes(list(model.graph.inputs))
