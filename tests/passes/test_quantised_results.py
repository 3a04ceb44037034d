"""Results of convolutions as bytes: a range for each channel, and one operator of ONNX Runtime for all of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from equality import make_model, operators, run_model
from small_denoiser import make_denoiser, make_feeds, measure_table, quantise_everything
from test_lower_quantised_conv import KERNELS, LARGEST

from sdc.compiler.calibration.options import CalibrationOptions
from sdc.engines.errors import PassError
from sdc.engines.targets import TARGETS
from sdc.passes.base import run_passes
from sdc.passes.lowering.lower_conv_to_bytes import LowerConvToBytes
from sdc.passes.pipeline import lowering_passes
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.quantisation import Kind, find_layers
from sdc.passes.precision.range_rules import MAX, RangeRule
from sdc.passes.precision.tensor_statistics import ChannelRanges

CHANNELS, OUTPUTS = 6, 9
CONV = """<ir_version: 10, opset_import: ["": 23]> g (float[B, 6, H, W] x) => (float[B, 9, K, L] y)
    <float scale = {{0.02}}, uint8 zero = {{101}}> {{
        q = QuantizeLinear (x, scale, zero) d = DequantizeLinear (q, scale, zero)
        v = DequantizeLinear <axis = 0> (w, t)
        c = Conv <{attributes}> (d, v{bias})
        r = QuantizeLinear <axis = 1> (c, u, z)
        y = DequantizeLinear <axis = 1> (r, u, z) }}"""
STEPS = np.geomspace(0.004, 2, OUTPUTS).astype(np.float32)
"""Of the result's channels: the last one's range is 500 times the first one's."""


def make_conv(attributes: str, kernel: tuple[int, int] = (3, 3), *, bias: bool = True, **other: np.ndarray) -> ir.Model:
    random = np.random.default_rng(11)
    weights = {
        "w": random.integers(-LARGEST, LARGEST + 1, (OUTPUTS, CHANNELS, *kernel)).astype(np.int8),
        "t": (STEPS * random.uniform(0.1, 0.3, OUTPUTS)).astype(np.float32),
        "u": STEPS,
        "z": np.array([0, 255, 128, 1, 77, 200, 128, 3, 90], np.uint8),
        "b": (STEPS * random.normal(0, 40, OUTPUTS)).astype(np.float32),
    } | other
    if not bias:
        del weights["b"]
    return make_model(CONV.format(attributes=attributes, bias=", b" if bias else ""), weights)


def make_inputs() -> list[dict[str, np.ndarray]]:
    """Two sizes; values beyond the range on both sides, of the input and of the result."""
    random = np.random.default_rng(13)
    return [{"x": random.uniform(-3, 4, (2, CHANNELS, *size)).astype(np.float32)} for size in ((9, 7), (8, 11))]


def integers(result: np.ndarray) -> np.ndarray:
    return np.round(result / STEPS[:, None, None]).astype(int)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KERNELS)
def test_integers_are_those_of_the_dequantised_convolution(kind: str, bias: bool):
    """But for ties: the sums of both are rounded in another order."""
    kernel, attributes = KERNELS[kind]
    model = make_conv(attributes, kernel, bias=bias)
    inputs = make_inputs()
    expected = [integers(run_model(model, each)["y"]) for each in inputs]
    assert LowerConvToBytes().run(model).matched == 1
    assert operators(model) == ["QuantizeLinear", "QLinearConv", "DequantizeLinear"]
    for each, wanted in zip(inputs, expected, strict=True):
        difference = np.abs(integers(run_model(model, each)["y"]) - wanted)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 5e-3
        channels = wanted.max(axis=(0, 2, 3)) - wanted.min(axis=(0, 2, 3))
        assert (channels > 60).sum() > OUTPUTS // 2, "the channels must use their ranges"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"z": np.zeros(OUTPUTS, np.int8)}, "not quantised to uint8 with 9 constant scales"),
        ({"b": np.full(OUTPUTS, 1e9, np.float32)}, "the bias does not fit in 32 bits"),
    ],
)
def test_other_results_are_left(change: dict[str, np.ndarray], reason: str):
    model = make_conv("pads = [1, 1, 1, 1]", **change)
    before = operators(model)
    report = LowerConvToBytes().run(model)
    assert [reason in each.reason for each in report.skipped] == [True]
    assert operators(model) == before


def test_channels_of_no_weights_keep_their_bias():
    """Their weights' scale is 1, by which a bias would be rounded to whole steps of the input."""
    random = np.random.default_rng(23)
    weights = random.integers(-LARGEST, LARGEST + 1, (OUTPUTS, CHANNELS, 3, 3)).astype(np.int8)
    weights[[0, 4]] = 0
    scales = (STEPS * random.uniform(0.1, 0.3, OUTPUTS)).astype(np.float32)
    scales[[0, 4]] = 1
    model = make_conv("pads = [1, 1, 1, 1]", w=weights, t=scales, z=np.full(OUTPUTS, 128, np.uint8))
    inputs = make_inputs()
    expected = [integers(run_model(model, each)["y"]) for each in inputs]
    assert LowerConvToBytes().run(model).matched == 1
    for each, wanted in zip(inputs, expected, strict=True):
        assert np.abs(integers(run_model(model, each)["y"]) - wanted).max() <= 1


def test_coarse_biases_are_left():
    model = make_conv("pads = [1, 1, 1, 1]", t=np.full(OUTPUTS, 1, np.float32))
    report = LowerConvToBytes().run(model)
    assert ["more than half a step of the result" in each.reason for each in report.skipped] == [True]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("=> (float[B, 9, K, L] y)", "=> (float[B, 9, K, L] y, float[B, 9, K, L] c)"),
        ("y = Dequantize", "e = Abs (c) y = Dequantize"),
        ("r = QuantizeLinear <axis = 1> (c, u, z)", "e = Abs (c) r = QuantizeLinear <axis = 1> (e, u, z)"),
    ],
)
def test_results_that_something_else_reads_are_left(old: str, new: str):
    text = CONV.format(attributes="pads = [1, 1, 1, 1]", bias="")
    assert old in text
    weights = {"w": np.ones((OUTPUTS, CHANNELS, 3, 3), np.int8), "t": STEPS, "u": STEPS, "z": np.zeros(9, np.uint8)}
    model = make_model(text.replace(old, new), weights)
    assert LowerConvToBytes().run(model).matched == 0
    assert "Conv" in operators(model)


def test_ranges_that_are_found_in_each_run_are_left():
    text = CONV.format(attributes="pads = [1, 1, 1, 1]", bias="").replace(
        "q = QuantizeLinear (x, scale, zero) d = DequantizeLinear (q, scale, zero)",
        "q, k, o = DynamicQuantizeLinear (x) d = DequantizeLinear (q, k, o)",
    )
    weights = {"w": np.ones((OUTPUTS, CHANNELS, 3, 3), np.int8), "t": STEPS, "u": STEPS, "z": np.zeros(9, np.uint8)}
    report = LowerConvToBytes().run(make_model(text, weights))
    assert [each.reason for each in report.skipped] == ["the range of the activations is found in each run"]


def with_results(model: ir.Model, table: CalibrationTable, scale: float = 1.0) -> CalibrationTable:
    """The table with what its convolutions write, as seen in one run."""
    names = [layer.node.outputs[0].name for layer in find_layers(model)[0] if layer.node.op_type == Kind.CONV]
    watched = model.clone()
    for node in watched.graph:
        watched.graph.outputs.extend(each for each in node.outputs if each.name in names and not each.is_graph_output())
    found = run_model(watched, make_feeds())
    axes = (0, 2, 3)
    results = {
        name: ChannelRanges(
            tuple((scale * found[name].min(axis=axes)).tolist()), tuple((scale * found[name].max(axis=axes)).tolist())
        )
        for name in names
        if name is not None
    }
    return replace(table, results=results)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_denoisers_convolutions_write_bytes(symmetric: bool):
    plain = make_denoiser()
    feeds = make_feeds()
    expected = run_model(plain, feeds)
    table = with_results(plain, measure_table(plain, feeds))
    errors = {}
    for results in (False, True):
        model = plain.clone()
        report = quantise_everything(model, table, rule=RangeRule(MAX, symmetric=symmetric, results=results))
        assert report.details is not None
        written = report.details["results"]
        run_passes(lowering_passes("onnxruntime"), model)
        assert operators(model).count("QLinearConv") == written
        assert (written > 0) == results
        found = run_model(model, feeds)
        errors[results] = max(float(np.abs(found[n] - v).max() / np.abs(v).max()) for n, v in expected.items())
    assert errors[True] < 2 * errors[False], "what is rounded once more is read rounded anyway"


def quantise(table: CalibrationTable, rule: RangeRule, model: ir.Model) -> int:
    """The number of results that are quantised."""
    details = quantise_everything(model, table, rule=rule).details
    assert details is not None
    return int(details["results"])


def test_results_are_quantised_only_where_the_rule_and_the_table_say_so():
    model = make_denoiser()
    table = measure_table(model, make_feeds())
    known = with_results(model, table)
    assert quantise(known, RangeRule(MAX, results=True), model.clone()) > 0
    assert quantise(known, RangeRule(MAX), model.clone()) == 0
    rule = RangeRule(MAX, results=True)
    told = quantise_everything(model.clone(), table, rule=rule).details
    assert told is not None
    assert told["results"] == 0, "a table of an earlier version"
    assert told["results_without_range"] == quantise(known, rule, model.clone()) + 1, "the network's output is one"


def test_what_the_network_gives_out_stays_as_it_is():
    model = make_denoiser()
    table = with_results(model, measure_table(model, make_feeds()))
    quantise(table, RangeRule(MAX, results=True), model)
    for output in model.graph.outputs:
        producer = output.producer()
        assert producer is not None
        assert producer.op_type != "DequantizeLinear"


@pytest.mark.parametrize("bad", [(np.nan,), (1.0,) * 77])
def test_ranges_that_cannot_be_are_refused(bad: tuple[float, ...]):
    model = make_denoiser()
    table = with_results(model, measure_table(model, make_feeds()))
    name = next(iter(table.results))
    channels = len(table.results[name].minima)
    broken = replace(
        table, results={name: ChannelRanges((bad * channels)[: max(channels, len(bad))], (1.0,) * channels)}
    )
    with pytest.raises(PassError, match="not finite numbers, one for each"):
        quantise(broken, RangeRule(MAX, results=True), model)


def test_results_are_for_onnxruntime_and_static_ranges():
    def rule(target: str, **options: str) -> RangeRule:
        return CalibrationOptions(**options).rule_for(TARGETS[target])

    assert [rule(target).results for target in ("cpu", "ort-cpu", "rtx")] == [False, True, False]
    assert not rule("ort-cpu", method="dynamic").results


def test_a_table_keeps_its_results():
    model = make_denoiser()
    table = with_results(model, measure_table(model, make_feeds()))
    plain = table.to_json()
    assert CalibrationTable.from_json(plain).results == {
        name: ChannelRanges(
            tuple(np.array(each.minima, np.float32).tolist()), tuple(np.array(each.maxima, np.float32).tolist())
        )
        for name, each in table.results.items()
    }
    del plain["results"]
    assert CalibrationTable.from_json(plain).results == {}
