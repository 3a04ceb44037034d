"""SmoothQuant: the same function, its equation, its preconditions, and outliers that it recovers from."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from equality import apply_proven
from exported_graphs import feed, load_graph
from small_denoiser import make_denoiser, make_feeds, make_fused_denoiser, make_model, measure_table, run_model

from sdc.engines.errors import InputError, PassError
from sdc.passes.base import run_passes
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.pipeline import canonical_passes, fusion_passes
from sdc.passes.precision.calibration_table import Smoothing
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.quantisation import find_layers
from sdc.passes.precision.smooth_quant import SmoothQuant
from sdc.passes.precision.smoothing_rule import SmoothingRule, parse_smoothing
from sdc.passes.precision.smoothing_sites import find_sites

EVERY_CHANNEL = SmoothingRule(outlier_ratio=1)

PLANTED = {
    # what is multiplied (by its first or, with True, its last axis), and the rows or columns that undo it
    "norm-linear": (("g_3", "b_3"), "w_interior_3", 0),
    "norm-conv": (("g_2", "b_2"), "w_interior_2", 1),
    "value-projection": (("w_prompt_2",), "w_interior_4", 0),
}


def smoothing_of(model: ir.Model, feeds: dict[str, np.ndarray], rule: SmoothingRule = EVERY_CHANNEL) -> Smoothing:
    tensors = measure_table(model, feeds).tensors
    magnitudes = {name: tuple(each.channel_magnitudes.tolist()) for name, each in tensors.items()}
    return Smoothing(digest_from_model(model), rule, magnitudes)


def plant(model: ir.Model, places: list[str]) -> None:
    """Outliers of 10, 50 and 200 times by hand, in the graph before fusion."""
    for index, place in enumerate(places):
        writers, reader, axis = PLANTED[place]
        for channel, factor in zip((index, index + 2, index + 5), (10, 50, 200), strict=True):
            for name in writers:
                _multiply(model, name, -1, channel, factor)
            _multiply(model, reader, axis, channel, 1 / factor)


def _multiply(model: ir.Model, name: str, axis: int, channel: int, factor: float) -> None:
    value = model.graph.initializers[name]
    array = value.const_value.numpy().copy()
    np.moveaxis(array, axis, 0)[channel] *= factor
    value.const_value = ir.tensor(array, name=name)


def fused(model: ir.Model) -> ir.Model:
    run_passes([*canonical_passes(), *fusion_passes()], model)
    return model


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_function_is_the_same(alpha: float):
    model, feeds = make_fused_denoiser(), make_feeds()
    smoothing = smoothing_of(model, feeds, SmoothingRule(alpha, 1))
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    (report,) = apply_proven(SmoothQuant(smoothing), model, [feeds, make_feeds(seed=18)])
    assert report.matched == 3
    assert report.details is not None
    assert report.details["largest_factor"] > 1.1
    changed = [node.op_type for node in model.graph for value in node.inputs if value and ".smoothed" in value.name]
    assert len(changed) >= 7
    for name, array in before.items():  # originals are left for their other readers
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)


def test_function_of_a_whole_unet_is_the_same():
    model = load_graph("unet")
    run_passes([*canonical_passes(), *fusion_passes("unet")], model)
    feeds = feed("unet")
    random = np.random.default_rng(89)
    layers, _ = find_layers(model)
    magnitudes = {
        layer.activation.name or "": tuple(np.exp(random.normal(0, 2, layer.channels)).tolist()) for layer in layers
    }
    smoothing = Smoothing(digest_from_model(model), EVERY_CHANNEL, magnitudes)
    (report,) = apply_proven(SmoothQuant(smoothing), model, [feeds])
    # 11 transformers: three layer norms, two attentions, a gate and a group norm each; and an image to be upsampled
    assert report.matched == 78
    behind = {skipped.reason for skipped in report.skipped}
    assert any("GroupNormSilu" in reason for reason in behind)


def test_factors_are_those_of_the_equation():
    activations, weights = np.array([4.0, 1.0, 9.0, 0.0, 2.0]), np.array([1.0, 4.0, 1.0, 3.0, 0.0])
    factors = SmoothingRule(0.5, 1).factors(activations, weights)
    expected = np.sqrt(activations[:3] / weights[:3])
    np.testing.assert_allclose(factors[:3], expected / np.median(expected))
    np.testing.assert_array_equal(factors[3:], 1)
    np.testing.assert_array_equal(SmoothingRule(0.5, 1).factors(np.zeros(3), np.ones(3)), 1)
    one = SmoothingRule(1.0, 1).factors(activations[:3], weights[:3])
    np.testing.assert_allclose(activations[:3] / one, np.full(3, np.median(activations[:3])))


def test_channels_that_are_no_outliers_are_left_alone():
    activations, weights = np.array([1.0, 2.0, 3.9, 40.0, 0.9, 0.02]), np.ones(6)
    rule = SmoothingRule(1.0, 4)
    factors = rule.factors(activations, weights)
    median = np.sqrt(1.0 * 2.0)
    np.testing.assert_allclose(factors, [1, 1, 1, 40 / median, 1, 0.02 / median])
    # However outliers are scaled, the same comes out.
    scales = np.array([1.0, 1.0, 1.0, 1 / 3, 1.0, 1 / 50])
    again = rule.factors(activations * scales, weights / scales)
    np.testing.assert_allclose(activations * scales / again, activations / factors)


def test_a_graph_without_outliers_stays_as_it_is():
    model, feeds = make_fused_denoiser(), make_feeds()
    (report,) = apply_proven(SmoothQuant(smoothing_of(model, feeds, SmoothingRule(outlier_ratio=100))), model, [feeds])
    assert report.matched == 0
    assert report.details is not None
    assert report.details["sites"] == 3
    assert not any(".smoothed" in (value.name or "") for node in model.graph for value in node.inputs if value)


@pytest.mark.parametrize("places", [["norm-conv"], ["value-projection"], list(PLANTED)])
@pytest.mark.parametrize("rule", [SmoothingRule(), EVERY_CHANNEL])
def test_planted_outliers_leave_no_trace(places: list[str], rule: SmoothingRule):
    feeds = make_feeds()
    damage = {}
    for planted in (False, True):
        for smooth in (False, True):
            model = make_denoiser()
            if planted:
                plant(model, places)
            model = fused(model)
            (exact,) = run_model(model, feeds)
            if smooth:
                SmoothQuant(smoothing_of(model, feeds, rule)).run(model)
            InsertQdq(measure_table(model, feeds)).run(model)
            (found,) = run_model(model, feeds)
            damage[planted, smooth] = float(np.sqrt(np.mean(np.square(found - exact))))
    # A decibel is 12 %.
    assert damage[True, False] > 1.3 * damage[False, False], "the outliers hurt nothing: recovery would prove nothing"
    assert damage[True, True] < 1.12 * damage[False, True]


def test_planting_changes_nothing_in_float32():
    feeds = make_feeds()
    (before,) = run_model(make_denoiser(), feeds)
    model = make_denoiser()
    plant(model, list(PLANTED))
    (after,) = run_model(model, feeds)
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6 * np.abs(before).max())


def sites_of(text: str, weights: dict[str, tuple[int, ...]]) -> tuple[int, str]:
    random = np.random.default_rng(97)
    model = make_model(
        f'<ir_version: 10, opset_import: ["": 23]> {text}',
        {name: random.normal(size=shape).astype(np.float32) for name, shape in weights.items()},
    )
    sites, skipped = find_sites(find_layers(model)[0])
    return len(sites), "; ".join(each.reason for each in skipped)


WEIGHTS = {"g": (6,), "b": (6,), "w": (6, 4)}


def test_norm_before_a_product_is_a_site():
    text = "g (float[5, 6] x) => (float[5, 4] y) { n = LayerNormalization (x, g, b) y = MatMul (n, w) }"
    assert sites_of(text, WEIGHTS) == (1, "")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("n = LayerNormalization (x, g, b) s = Sigmoid (n) y = MatMul (s, w)", "behind Sigmoid, which is not linear"),
        ("y = MatMul (x, w)", "an input of the graph"),
        ("n = LayerNormalization (x, x1, b) y = MatMul (n, w)", "are not constants with one number"),
        ("n = LayerNormalization (x, one) y = MatMul (n, w)", "are not constants with one number"),
        (
            "q = MatMul (x3, k) a = Attention <q_num_heads = 2, kv_num_heads = 2> (q, q, q) y3 = MatMul (a, w)",
            "queries",
        ),
    ],
)
def test_what_is_no_site(body: str, reason: str):
    inputs = "float[5, 6] x, float[6] x1, float[2, 5, 6] x3"
    output = "float[2, 5, 4] y3" if "y3" in body else "float[5, 4] y"
    count, reasons = sites_of(f"g ({inputs}) => ({output}) {{ {body} }}", WEIGHTS | {"k": (6, 6), "one": (1,)})
    assert count == 0
    assert reason in reasons


def test_other_readers_prevent_it():
    text = """g (float[5, 6] x) => (float[5, 4] y, float[5, 6] z)
        { n = LayerNormalization (x, g, b) y = MatMul (n, w) z = Neg (n) }"""
    assert sites_of(text, WEIGHTS) == (0, "something else reads it too")


def test_values_with_another_reader_are_left():
    text = """g (float[2, 5, 6] x) => (float[2, 5, 4] y, float[2, 5, 6] z) { q = MatMul (x, k) v = MatMul (x, u)
        a = Attention <q_num_heads = 2, kv_num_heads = 2> (q, q, v) y = MatMul (a, w) z = Neg (v) }"""
    count, reasons = sites_of(text, WEIGHTS | {"k": (6, 6), "u": (6, 6)})
    assert count == 0
    assert "no projection of their own" in reasons


def test_shared_scales_are_copied():
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[5, 6] x) => (float[5, 4] y, float[5, 6] z)
        { n = LayerNormalization (x, g, b) y = MatMul (n, w) z = LayerNormalization (x, g, b) }"""
    random = np.random.default_rng(101)
    model = make_model(text, {name: random.normal(size=shape).astype(np.float32) for name, shape in WEIGHTS.items()})
    magnitudes = {"n": (1.0, 20.0, 3.0, 0.5, 7.0, 100.0), "x": (1.0,) * 6}
    feeds = {"x": random.normal(size=(5, 6)).astype(np.float32)}
    smoothing = Smoothing(digest_from_model(model), EVERY_CHANNEL, magnitudes)
    (report,) = apply_proven(SmoothQuant(smoothing), model, [feeds])
    assert report.matched == 1


def test_other_graphs_and_missing_magnitudes_are_refused():
    model, feeds = make_fused_denoiser(), make_feeds()
    smoothing = smoothing_of(model, feeds)
    with pytest.raises(PassError, match="belongs to the graph"):
        SmoothQuant(smoothing).run(make_fused_denoiser(seed=6))
    with pytest.raises(PassError, match="no magnitudes of tensor"):
        SmoothQuant(Smoothing(smoothing.graph_digest, SmoothingRule(), {})).run(model)


def test_rules_are_read():
    assert parse_smoothing("none") is None
    assert parse_smoothing("0.7") == SmoothingRule(0.7)
    assert parse_smoothing("0.7:2") == SmoothingRule(0.7, 2)
    assert parse_smoothing(SmoothingRule(0.25, 8).label) == SmoothingRule(0.25, 8)


@pytest.mark.parametrize("text", ["-0.1", "1.1", "nan", "0.5:0.9", "0.5:inf", "0.5:", "much"])
def test_what_is_no_rule_is_refused(text: str):
    with pytest.raises(InputError, match=r"SmoothQuant|--smooth-quant"):
        parse_smoothing(text)


def test_unequal_rules_have_unequal_labels():
    assert SmoothingRule(0.5000001).label != SmoothingRule().label


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_magnitudes_that_are_no_numbers_are_refused(bad: float):
    for activations, weights in (([1.0, bad], [1.0, 1.0]), ([1.0, 1.0], [1.0, bad])):
        with pytest.raises(InputError, match="NaN or infinity"):
            SmoothingRule().factors(np.array(activations), np.array(weights))


def test_a_channel_that_is_nearly_dead_keeps_weights_that_half_holds():
    factors = SmoothingRule().factors(np.array([1.0, 1.0, 1.0, 1e-20]), np.ones(4))
    np.testing.assert_array_equal(factors[:3], 1)
    assert factors[3] == pytest.approx(1e-4)
