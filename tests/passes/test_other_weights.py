"""A calibration and a plan, handed on to a graph of the same layers with other weights."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import make_feeds, make_fused_denoiser, measure_table

from sdc.engines.errors import InputError
from sdc.passes.base import run_passes
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.precision.calibration_table import CalibrationTable, Smoothing
from sdc.passes.precision.formats import Format
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.other_weights import plan_for_weights, table_for
from sdc.passes.precision.plan import uniform_plan
from sdc.passes.precision.quantisation import find_layers
from sdc.passes.precision.smooth_quant import SmoothQuant, smooth
from sdc.passes.precision.smoothing_rule import SmoothingRule


def calibrated(seed: int = 5) -> CalibrationTable:
    """Of the small denoiser, smoothed in every channel."""
    model, feeds = make_fused_denoiser(seed), make_feeds()
    magnitudes = {name: each.channel_magnitudes for name, each in measure_table(model, feeds).tensors.items()}
    rows = {name: tuple(row.tolist()) for name, row in magnitudes.items()}
    smoothing = smooth(model, Smoothing(digest_from_model(model), SmoothingRule(outlier_ratio=1), rows))
    return replace(measure_table(model, feeds), smoothing=smoothing)


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}


def test_the_table_of_the_graph_itself_comes_back() -> None:
    table = calibrated()
    assert table_for(make_fused_denoiser(), table) is table


def test_factors_and_ranges_stay_and_the_graph_is_the_new_one() -> None:
    table = calibrated()
    assert table.smoothing is not None
    assert table.smoothing.factors is not None
    assert len(table.smoothing.factors) == 3
    handed_on = table_for(make_fused_denoiser(6), table)
    assert handed_on.tensors == table.tensors
    assert handed_on.smoothing is not None
    assert handed_on.smoothing.factors == table.smoothing.factors
    model = make_fused_denoiser(6)
    assert handed_on.smoothing.graph_digest == digest_from_model(model) != table.smoothing.graph_digest
    smoothed, quantised = run_passes([SmoothQuant(handed_on.smoothing), InsertQdq(handed_on)], model)
    assert smoothed.matched == 3
    assert quantised.matched > 3
    assert table_for(make_fused_denoiser(), handed_on) == table, "and back"


def test_smoothing_by_kept_factors_divides_by_just_them() -> None:
    """The rule would find others in other weights, for which nothing was measured."""
    table, model = calibrated(), make_fused_denoiser(6)
    assert table.smoothing is not None
    anew = smooth(make_fused_denoiser(6), replace(table.smoothing, factors=None)).factors
    assert anew is not None
    handed_on = table_for(model, table).smoothing
    assert handed_on is not None
    assert handed_on.factors is not None
    assert all(not np.allclose(handed_on.factors[name], anew[name], rtol=0.01) for name in anew)
    plain, changed = weights(make_fused_denoiser(6)), weights(model)
    scaled = [name for name in changed if name not in plain]
    ratios = [changed[name] / plain[name.removesuffix(".smoothed")] for name in scaled]
    expected = np.concatenate([np.asarray(row) for row in handed_on.factors.values()])
    for ratio in ratios:
        found = np.unique(ratio.astype(np.float32).round(4))
        both = np.concatenate([expected, 1 / expected, [1.0]])
        assert all(np.abs(both - value).min() < 1e-3 * value for value in found)


def test_factors_survive_the_file_to_the_last_digit() -> None:
    table = calibrated()
    read = CalibrationTable.from_json(json.loads(json.dumps(table.to_json())))
    assert read.smoothing is not None
    assert table.smoothing is not None
    assert read.smoothing.factors == table.smoothing.factors


def test_a_table_without_factors_is_refused() -> None:
    table = calibrated()
    assert table.smoothing is not None
    old = replace(table, smoothing=replace(table.smoothing, factors=None))
    with pytest.raises(InputError, match="did not keep what it smoothed by; export the bundle again"):
        table_for(make_fused_denoiser(6), old)


def test_a_table_without_smoothing_is_handed_on() -> None:
    table = measure_table(make_fused_denoiser(), make_feeds())
    model = make_fused_denoiser(6)
    assert table_for(model, table) == replace(table, graph_digest=digest_from_model(model))


def test_layers_that_read_other_tensors_are_refused() -> None:
    table = measure_table(make_fused_denoiser(), make_feeds())
    model = make_fused_denoiser(6)
    name = find_layers(model)[0][0].activation.name
    lacking = replace(table, tensors={key: each for key, each in table.tensors.items() if key != name})
    with pytest.raises(InputError, match=rf"calibration is of another architecture .*: {name} is None there and"):
        table_for(model, lacking)
    statistics = table.tensors[str(name)]
    narrow = replace(statistics, channel_means=statistics.channel_means[1:])
    with pytest.raises(InputError, match=rf"{name} is {len(narrow.channel_means)} there and"):
        table_for(model, replace(table, tensors={**table.tensors, str(name): narrow}))


def test_a_plan_is_handed_on_to_the_same_layers_only() -> None:
    plan, other = uniform_plan(make_fused_denoiser(), Format.W8), make_fused_denoiser(6)
    with pytest.raises(InputError, match="the precision plan belongs to the graph"):
        plan.check_graph(other)
    handed_on = plan_for_weights(other, plan)
    handed_on.check_graph(other)
    assert handed_on.layers == plan.layers
    with pytest.raises(InputError, match="the precision plan is of another architecture or version of sdc: "):
        plan_for_weights(other, replace(plan, layers=plan.layers[1:]))
