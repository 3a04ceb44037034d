"""Plans of precisions: what a single precision stands for, the file, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import make_denoiser, make_feeds, make_fused_denoiser, measure_table, run_model

from sdc.engines.errors import InputError
from sdc.passes.base import run_passes
from sdc.passes.pipeline import MIXED, precision_passes
from sdc.passes.precision.formats import FLOATING, Format
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.layer_roles import Role
from sdc.passes.precision.plan import W4_SENSITIVE, PrecisionPlan, uniform_plan
from sdc.passes.precision.plan_file import plan_from_text, read_plan, text_from_plan
from sdc.passes.precision.quantisation import DEFAULT_KEPT, DEFAULT_WEIGHTS_ONLY

SIZES = {"B": 2, "H": 5, "W": 7}


def change(plan: PrecisionPlan, name: str, wanted: Format) -> PrecisionPlan:
    assert name in plan.by_name()
    layers = (replace(layer, format=wanted) if layer.name == name else layer for layer in plan.layers)
    return replace(plan, layers=tuple(layers))


@pytest.mark.parametrize("precision", [Format.INT8, Format.FP8])
def test_policy_of_quantised_activations(precision: Format):
    plan = uniform_plan(make_fused_denoiser(), precision, default=Format.BF16, sizes=SIZES)
    for layer in plan.layers:
        expected = precision if layer.role not in DEFAULT_KEPT else Format.BF16
        assert layer.format is (Format.W8 if layer.role in DEFAULT_WEIGHTS_ONLY else expected)
    assert {layer.role for layer in plan.layers} == set(Role)
    kept = [layer for layer in plan.layers if layer.role is Role.SHORTCUT]
    assert "skip connection" in kept[0].reason
    first = next(layer for layer in plan.layers if layer.role is Role.INPUT)
    assert first.macs == 2 * 6 * 5 * 7 * 27
    assert first.shape == (6, 3, 3, 3)


def test_policy_of_four_bits():
    plan = uniform_plan(make_fused_denoiser(), Format.W4)
    for layer in plan.layers:
        length = int(np.prod(layer.shape)) // (layer.shape[1] if len(layer.shape) == 2 else layer.shape[0])
        fits = layer.role not in W4_SENSITIVE and length % 32 == 0
        assert layer.format is (Format.W4 if fits else Format.W8), layer
    formats = [layer.format for layer in plan.layers]
    assert formats.count(Format.W4) == 2
    assert any("do not divide into blocks of 32" in layer.reason for layer in plan.layers)


def test_file_says_the_same():
    model = make_fused_denoiser()
    plan = change(uniform_plan(model, Format.INT8, sizes=SIZES), "query", Format.W4)
    text = text_from_plan(plan)
    assert plan_from_text(text, origin="plan.toml") == plan
    (line,) = [line for line in text.splitlines() if '"query"' in line]
    assert 'precision = "w4"' in line
    edited = text.replace(line, line.replace('"w4"  ', '"fp32"').replace('"w4"', '"fp32"'))
    assert plan_from_text(edited, origin="plan.toml").by_name()["query"].format is Format.FP32


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema = 1", "schema = 7", "schema 1, found 7"),
        ("schema = 1", "schema =", "no TOML"),
        ('precision = "int8"', 'precision = "int5"', "is 'int5'; choose one of fp32"),
        ('default = "fp16"', 'default = "int8"', "default of a plan is 'int8'"),
        ("block_size = 32", "block_size = 33", "blocks of 33"),
        ("block_size = 32", 'block_size = "32"', "expected block_size as int"),
        ('role = "input"', 'role = "door"', "role is 'door'"),
        ('role = "input"', 'colour = 3, role = "input"', "unknown entry 'colour'; there are name, precision"),
        ("layers = [", "layers = [ 3,", "has to be a table"),
        ('default = "fp16"', 'default = "bf16"', "mixes fp16 and bf16"),
    ],
)
def test_files_that_are_refused(old: str, new: str, message: str):
    text = text_from_plan(uniform_plan(make_fused_denoiser(), Format.INT8))
    assert old in text
    with pytest.raises(InputError, match=message):
        plan_from_text(text.replace(old, new, 1), origin="plan.toml")


def test_layer_named_twice_and_missing_file_are_refused(tmp_path):
    plan = uniform_plan(make_fused_denoiser(), Format.INT8)
    with pytest.raises(InputError, match=f"names the layer '{plan.layers[0].name}' 2 times"):
        plan_from_text(text_from_plan(replace(plan, layers=plan.layers + plan.layers[:1])), origin="plan.toml")
    with pytest.raises(InputError, match="cannot read"):
        read_plan(tmp_path / "none.toml")


def test_plans_of_other_graphs_are_refused():
    plan = uniform_plan(make_denoiser(), Format.INT8)
    plan.check_graph(make_denoiser())
    with pytest.raises(InputError, match="belongs to the graph"):
        plan.check_graph(make_denoiser(seed=6))


def test_unknown_and_missing_layers_are_refused():
    model, feeds = make_denoiser(), make_feeds()
    table, plan = measure_table(model, feeds), uniform_plan(model, Format.INT8)
    renamed = tuple(replace(each, name="elsewhere") if each.name == "query" else each for each in plan.layers)
    message = "no line for the layer 'query' and names the layer 'elsewhere' that the graph does not have"
    with pytest.raises(InputError, match=message):
        InsertQdq(table, replace(plan, layers=renamed)).run(model)


def test_int8_without_ranges_is_refused():
    model = make_denoiser()
    with pytest.raises(InputError, match="without a calibration table"):
        InsertQdq(None, uniform_plan(model, Format.INT8)).run(model)


def test_mixed_plan_types_every_layer():
    model, feeds = make_fused_denoiser(), make_feeds()
    (exact,) = run_model(model, feeds)
    table = measure_table(model, feeds)
    plan = uniform_plan(model, Format.INT8, default=Format.FP32)
    for name, wanted in (("query", Format.W4), ("key", Format.W8), ("first", Format.FP16), ("block", Format.FP32)):
        plan = change(plan, name, wanted)
    half, only = plan.float_exceptions()
    assert (half, only) == (Format.FP16, {"first"})
    run_passes(precision_passes(MIXED, quantise=(InsertQdq(table, plan),), remainder=half, only=only), model)
    layers = {node.outputs[0].name: node for node in model.graph}
    weights = {name: layers[name].inputs[1] for name in ("query", "key", "first", "block")}
    stored = {name: value.producer() and value.producer().inputs[0].dtype for name, value in weights.items()}
    assert stored == {"query": ir.DataType.INT4, "key": ir.DataType.INT8, "first": None, "block": None}
    assert {name: value.dtype for name, value in weights.items()} == {
        "query": ir.DataType.FLOAT,
        "key": ir.DataType.FLOAT,
        "first": ir.DataType.FLOAT16,
        "block": ir.DataType.FLOAT,
    }
    (found,) = run_model(model, feeds)
    assert 0 < np.abs(found - exact).max() < 0.2 * np.abs(exact).max()


def test_float_plans_need_no_pairs():
    plan = uniform_plan(make_denoiser(), Format.FP16)
    assert plan.formats() == {Format.FP16}
    assert plan.with_default(Format.FP32).formats() == {Format.FP32}
    assert plan.with_default(Format.FP32).default is Format.FP32
    assert plan.formats() <= FLOATING
