"""Which targets' int8 weights have 7 bits, and how an engine says so."""

from __future__ import annotations

import argparse

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from sdc.compiler.build.built import weight_bits_option
from sdc.compiler.calibration.options import CalibrationOptions
from sdc.compiler.cli.calibration_arguments import add_calibration_arguments, calibration_options
from sdc.engines.processor import exact_weight_bits
from sdc.engines.targets import TARGETS

GRAPH = """<ir_version: 10, opset_import: ["": 23]> g (float[4, 8] x) => (float[4, 8] y)
    <float s = {0.5}, int8 z = {-128}> {
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)
        v = DequantizeLinear (w, s)
        y = MatMul (d, v) }"""
WEIGHTS_ONLY = """<ir_version: 10, opset_import: ["": 23]> g (float[4, 8] x) => (float[4, 8] y) <float s = {0.5}> {
        v = DequantizeLinear (w, s)
        y = MatMul (x, v) }"""


@pytest.mark.parametrize(
    ("arguments", "target", "bits"),
    [
        (["--reduce-range"], "cpu", 7),
        (["--reduce-range"], "ort-cpu", 7),
        (["--reduce-range"], "rtx", 8),
        (["--no-reduce-range"], "cpu", 8),
        (["--no-reduce-range"], "ort-cpu", 8),
        ([], "cpu", exact_weight_bits()),
        ([], "ort-cpu", exact_weight_bits()),
        ([], "rtx", 8),
    ],
)
def test_targets_on_cpus_alone_have_seven(arguments: list[str], target: str, bits: int) -> None:
    parser = argparse.ArgumentParser()
    add_calibration_arguments(parser)
    options = calibration_options(parser.parse_args(arguments))
    assert options.rule_for(TARGETS[target]).weight_bits == bits


def test_this_processor_decides_where_nobody_does() -> None:
    assert CalibrationOptions().reduces_range == (exact_weight_bits() == 7)


@pytest.mark.parametrize(
    ("text", "largest", "expected"),
    [
        (GRAPH, 63, {"weight_bits": 7}),
        (GRAPH, -64, {"weight_bits": 8}),
        (GRAPH, 127, {"weight_bits": 8}),
        (WEIGHTS_ONLY, 127, {}),
    ],
)
def test_an_engine_that_multiplies_bytes_says_how_many_bits_weights_have(
    text: str, largest: int, expected: dict[str, int]
) -> None:
    """The zero point of the activations is no weight."""
    model = onnx.parser.parse_model(text)
    weight = np.zeros((8, 8), np.int8)
    weight[3, 5] = largest
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    assert weight_bits_option(ir.from_proto(model)) == expected
