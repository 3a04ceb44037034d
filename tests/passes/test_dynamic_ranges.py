"""Activations whose range is that of each run, against integers computed with NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import SPEC, make_feeds, make_fused_denoiser, make_model, measure_table, run_model

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.engines.errors import InputError, PassError
from sdc.engines.processor import exact_weight_bits
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.targets import TARGETS
from sdc.passes.base import run_passes
from sdc.passes.pipeline import lowering_passes
from sdc.passes.precision.correct_bias import CorrectBias
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.qdq_pair import insert_dynamic_pair
from sdc.passes.precision.range_rules import DYNAMIC, RangeRule, parse_rule

RULE = RangeRule(DYNAMIC, symmetric=False)

PAIR = """<ir_version: 10, opset_import: ["": 23]> g (float[5, 7] x) => (float[5, 7] y) { y = Identity (x) }"""


def rounded(x: np.ndarray) -> np.ndarray:
    """ONNX's DynamicQuantizeLinear and back: 255 steps from the lowest value to the highest, zero among them."""
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = np.float32((high - low) / np.float32(255)) if high > low else np.float32(1)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


@pytest.mark.parametrize(("low", "high"), [(-3, 4), (0.5, 9), (-7, -2), (0, 0), (-1e-3, 1e4)])
def test_pair_rounds_to_the_range_of_the_run(low: float, high: float):
    model = make_model(PAIR, {})
    value = insert_dynamic_pair(model.graph, model.graph.inputs[0], ir.DataType.FLOAT)
    model.graph[-1].replace_input_with(0, value)
    x = np.random.default_rng(3).uniform(low, high, (5, 7)).astype(np.float32)
    np.testing.assert_allclose(run_model(model, {"x": x})[0], rounded(x), rtol=1e-6)


def test_half_precision_is_refused():
    model = make_model(PAIR, {})
    with pytest.raises(PassError, match="a dynamic range of 'x', which is FLOAT16"):
        insert_dynamic_pair(model.graph, model.graph.inputs[0], ir.DataType.FLOAT16)


def test_a_network_follows_its_inputs_and_the_engine_follows_the_graph(tmp_path: Path):
    """Inputs eight times larger than those that were calibrated saturate static ranges alone."""
    model, feeds = make_fused_denoiser(), make_feeds()
    table = measure_table(model, feeds)
    louder = feeds | {"encoder_hidden_states": 8 * feeds["encoder_hidden_states"]}
    (exact,) = run_model(model, louder)
    errors = {}
    for rule in (replace(RULE, weight_bits=exact_weight_bits()), RangeRule(symmetric=False)):
        quantised = model.clone()
        run_passes([InsertQdq(table, rule=rule), CorrectBias(table)], quantised)
        (found,) = run_model(quantised, louder)
        errors[rule.method] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        if rule.method == DYNAMIC:
            run_passes(lowering_passes("onnxruntime"), quantised)
            assert "Conv" not in {node.op_type for node in quantised.graph if _reads_integers(node)}
            built = build_engine(Component(SPEC, quantised), TARGETS["ort-cpu"], tmp_path)
            source = EngineSource(SPEC, "onnxruntime", tuple(tmp_path / name for name in built.files), built.options)
            with open_session(source, threads=1) as session:
                engine = session.run(louder)["out_sample"]
            np.testing.assert_allclose(engine, found, atol=2e-2 * np.abs(found).max())
    assert errors[DYNAMIC] < 0.05
    assert errors[DYNAMIC] < errors["max"]


def _reads_integers(node: ir.Node) -> bool:
    producers = [None if value is None else value.producer() for value in node.inputs[:2]]
    return all(each is not None and each.op_type == "DequantizeLinear" for each in producers)


def test_rule_is_asymmetric():
    assert parse_rule("dynamic", symmetric=False) == RULE
    assert RULE.label == "dynamic, asymmetric"
    with pytest.raises(InputError, match="dynamic ranges are asymmetric"):
        parse_rule("dynamic")
    with pytest.raises(InputError, match="'dynamic' takes no number"):
        parse_rule("dynamic:3", symmetric=False)


def test_no_range_is_read_from_a_calibration():
    table = measure_table(make_fused_denoiser(), make_feeds())
    with pytest.raises(InputError, match="no range follows from a calibration by dynamic, asymmetric"):
        table.range_of(next(iter(table.tensors)), RULE)
