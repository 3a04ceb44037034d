"""What each layer's quantisation costs, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import SPEC, make_feeds, make_fused_denoiser, make_model, measure_table, run_model

from sdc.compiler.calibration.options import CalibrationOptions
from sdc.compiler.component import Component
from sdc.compiler.precision.automatic import choose_plan, fastest, planned_before
from sdc.compiler.precision.budget import parse_budget
from sdc.compiler.precision.layer_costs import LayerCost, LayerCosts, describe_seconds, modelled_costs
from sdc.compiler.precision.layer_times import measure_costs
from sdc.compiler.precision.sensitivity import Sensitivity, measure_sensitivity
from sdc.engines.specs import DimensionRange, TensorSpec
from sdc.engines.targets import Target, parse_targets
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.precision.formats import FLOATING, Format
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.plan import PrecisionPlan, uniform_plan
from sdc.passes.precision.range_rules import RangeRule
from sdc.passes.precision.switched_layers import SWITCHES, switch_layers

SIZES = {"B": 2, "H": 5, "W": 7}


def wanted_plan(model: ir.Model) -> PrecisionPlan:
    return uniform_plan(model, Format.INT8, default=Format.FP32, sizes=SIZES, kept=frozenset())


def only(plan: PrecisionPlan, names: set[str]) -> PrecisionPlan:
    layers = (layer if layer.name in names else replace(layer, format=Format.FP32) for layer in plan.layers)
    return replace(plan, layers=tuple(layers))


def test_switches_choose_between_the_two_graphs():
    model, feeds = make_fused_denoiser(), make_feeds()
    table, plan = measure_table(model, feeds), wanted_plan(model)
    switched = switch_layers(model, table, plan)
    (exact,) = run_model(model, feeds)
    off = {**feeds, SWITCHES: np.zeros(len(plan.layers), bool)}
    np.testing.assert_array_equal(run_model(switched, off)[0], exact)
    for name in ("query", "skip", "time_1"):
        expected = model.clone()
        InsertQdq(table, only(plan, {name})).run(expected)
        switches = np.array([layer.name == name for layer in plan.layers])
        assert switches.sum() == 1
        (found,) = run_model(switched, {**feeds, SWITCHES: switches})
        np.testing.assert_array_equal(found, run_model(expected, feeds)[0])
        assert not np.array_equal(found, exact)


def test_sensitivity_is_the_error_of_a_layer_alone():
    model, samples = make_fused_denoiser(), [make_feeds(1), make_feeds(2)]
    table, plan = measure_table(model, samples[0]), wanted_plan(model)
    runs: list[tuple[int, int]] = []
    found = measure_sensitivity(
        Component(SPEC, model), table, plan, samples, on_run=lambda done, of: runs.append((done, of))
    )
    assert runs[-1] == (2 * (len(plan.layers) + 1),) * 2
    assert set(found.layers) == {layer.name for layer in plan.layers}
    for names, error in (({"block"}, found.layers["block"]), (set(found.layers), found.all_layers)):
        quantised = model.clone()
        InsertQdq(table, only(plan, names)).run(quantised)
        exact = np.stack([run_model(model, each)[0] for each in samples])
        changed = np.stack([run_model(quantised, each)[0] for each in samples])
        expected = np.square(changed - exact).sum() / np.square(exact).sum()
        # ONNX Runtime's own optimisations turn single roundings.
        assert error == pytest.approx(expected, rel=0.2)


def additive(errors: dict[str, float]) -> Callable[[PrecisionPlan], float]:
    """Pictures whose PSNR is that of the layers' summed errors."""

    def measure(plan: PrecisionPlan) -> float:
        total = sum(errors[layer.name] for layer in plan.layers if layer.format not in FLOATING)
        return float(-10 * np.log10(total + 1e-12))

    return measure


def test_choice_meets_the_budget_with_the_least_kept():
    plan = wanted_plan(make_fused_denoiser())
    random = np.random.default_rng(3)
    errors = {layer.name: float(10 ** random.uniform(-6, -3)) for layer in plan.layers}
    measure = additive(errors)
    chosen = choose_plan(
        plan, Sensitivity(errors, 1.0), measure, budget=parse_budget("35dB"), costs=modelled_costs(plan)
    )
    assert chosen is not None
    assert chosen.quality == measure(chosen.plan) >= 35.0
    assert measure(plan) < 35.0
    kept = [layer for layer in chosen.plan.layers if layer.format in FLOATING]
    assert 0 < len(kept) < len(plan.layers)
    assert chosen.predicted_error == pytest.approx(10 ** (-chosen.quality / 10), rel=1e-5)
    assert 1 / 8 < chosen.time < 1
    # Of what is kept, the one ranked last would break the budget.
    last = max(kept, key=lambda layer: int(layer.reason.split("number ")[1].split()[0]))
    restored = (replace(layer, format=Format.INT8) if layer is last else layer for layer in chosen.plan.layers)
    assert measure(replace(chosen.plan, layers=tuple(restored))) < 35.0
    assert "kept for 35 dB" in last.reason


def test_loose_budget_keeps_nothing_and_impossible_budget_finds_nothing():
    plan = wanted_plan(make_fused_denoiser())
    errors = {layer.name: 1e-4 for layer in plan.layers}
    sensitivity, measure = Sensitivity(errors, 1.0), additive(errors)
    loose = choose_plan(plan, sensitivity, measure, budget=parse_budget("10dB"), costs=modelled_costs(plan))
    assert loose is not None
    assert loose.plan.formats() == {Format.INT8}
    assert choose_plan(plan, sensitivity, measure, budget=parse_budget("90dB"), costs=modelled_costs(plan)) is None


def test_nothing_is_found_where_nothing_is_faster():
    plan = uniform_plan(make_fused_denoiser(), Format.FP32, sizes=SIZES)
    assert (
        choose_plan(plan, Sensitivity({}, 0.0), lambda _: 0.0, budget=parse_budget("10dB"), costs=modelled_costs(plan))
        is None
    )


def test_the_fastest_candidate_is_taken_and_says_its_times():
    plan = uniform_plan(make_fused_denoiser(), Format.INT8, default=Format.FP32, sizes=SIZES)
    costs = LayerCosts({layer.name: LayerCost(4e-6, 1e-6) for layer in plan.layers}, describe_seconds)
    sensitivity = Sensitivity({layer.name: 1e-6 for layer in plan.layers}, 1.0)
    usual = planned_before(plan, sensitivity, costs, 50.0)
    assert (usual.quality, [layer.format for layer in usual.plan.layers]) == (50.0, [x.format for x in plan.layers])
    quantised = [layer for layer in usual.plan.layers if layer.format is Format.INT8]
    assert usual.predicted_error == pytest.approx(1e-6 * len(quantised))
    assert {layer.reason for layer in quantised} == {"1 µs a step instead of 4; alone it changes epsilon by 1.0e-03"}
    other = replace(usual, quality=60.0)
    decibels, distance = parse_budget("40dB"), parse_budget("fd=99")
    assert fastest([other, usual], [2.0, 1.0], decibels) is usual
    assert fastest([usual, other], [1.0, 1.02], decibels) is other
    assert fastest([usual, other], [1.0, 1.02], distance) is usual
    assert fastest([usual, other], [1.0, 1.2], decibels) is usual


def test_what_runs_seldom_costs_less():
    plan = wanted_plan(make_fused_denoiser())
    costs = LayerCosts({layer.name: LayerCost(4.0, 2.0) for layer in plan.layers}, describe_seconds)
    seldom = plan.layers[1].name
    scaled = costs.scaled({seldom}, 0.05)
    assert scaled.layers[seldom].saved == pytest.approx(0.1)
    assert all(cost.saved == 2.0 for name, cost in scaled.layers.items() if name != seldom)


def test_layers_that_are_not_faster_stay_as_they_are():
    plan = wanted_plan(make_fused_denoiser())
    slow = {plan.layers[2].name, plan.layers[5].name}
    costs = LayerCosts(
        {layer.name: LayerCost(2e-6, 3e-6 if layer.name in slow else 1e-6) for layer in plan.layers}, describe_seconds
    )
    errors = {layer.name: 1e-6 for layer in plan.layers}
    chosen = choose_plan(plan, Sensitivity(errors, 1.0), additive(errors), budget=parse_budget("10dB"), costs=costs)
    assert chosen is not None
    floating = {layer.name: layer.reason for layer in chosen.plan.layers if layer.format in FLOATING}
    assert floating.keys() == slow
    assert all(each.startswith("not faster in int8: 3 µs a step instead of 2") for each in floating.values())
    assert chosen.time == pytest.approx((len(plan.layers) + len(slow)) / (2 * len(plan.layers)))


def rules_of(targets: tuple[Target, ...]) -> dict[str, RangeRule]:
    return {target.name: CalibrationOptions().rule_for(target) for target in targets}


@pytest.mark.parametrize("names", ["cpu", "ort-cpu", "cpu,ort-cpu"])
def test_layers_are_timed_in_both_formats(names: str):
    model = make_fused_denoiser()
    plan = wanted_plan(model)
    before = digest_from_model(model)
    told: list[tuple[int, int]] = []
    targets = parse_targets(names)
    found = measure_costs(
        Component(SPEC, model), plan, targets, rules=rules_of(targets), on_layer=lambda *each: told.append(each)
    )
    assert found.layers.keys() == plan.by_name().keys()
    for layer in plan.layers:
        cost = found.layers[layer.name]
        assert cost.floating > 0
        assert (cost.planned == cost.floating) == (layer.format is plan.default)
    assert told[-1][0] == told[-1][1] <= len(plan.layers)
    assert digest_from_model(model) == before


def test_times_are_those_of_the_layers():
    """Of 38 and of 0.9 million multiply-adds: neither noise nor overhead turns these round."""
    model = make_model(
        """<ir_version: 10, opset_import: ["": 23]> g (float[B, 64, 384] sample) => (float[B, 64, 9] out_sample)
        { wide = MatMul (sample, w) out_sample = MatMul (wide, v) }""",
        {"w": np.ones((384, 768), np.float32), "v": np.ones((768, 9), np.float32)},
    )
    spec = replace(
        SPEC,
        inputs=(TensorSpec("sample", "float32", ("B", 64, 384)),),
        outputs=(TensorSpec("out_sample", "float32", ("B", 64, 9)),),
        dimensions={"B": DimensionRange(1, 2, 4)},
    )
    plan = uniform_plan(model, Format.INT8, default=Format.FP32, sizes={"B": 2}, kept=frozenset())
    targets = parse_targets("ort-cpu")
    costs = measure_costs(Component(spec, model), plan, targets, rules=rules_of(targets)).layers
    assert costs["wide"].floating > 3 * costs["out_sample"].floating
