"""Convolutions of bytes as products of matrices: the same numbers from integer arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from equality import apply_proven, make_model, operators

from sdc.engines.processor import exact_weight_bits
from sdc.passes.lowering.lower_quantised_conv import LowerQuantisedConv

CONV = """<ir_version: 10, opset_import: ["": 23]> g (float[B, 6, H, W] x) => (float[B, 9, K, L] y)
    <float scale = {{0.02}}, uint8 zero = {{101}}> {{
        q = QuantizeLinear (x, scale, zero) d = DequantizeLinear (q, scale, zero)
        v = DequantizeLinear <axis = 0> (w, t)
        y = Conv <{attributes}> (d, v{bias}) }}"""
KERNELS = {
    "3 x 3": ((3, 3), "pads = [1, 1, 1, 1]"),
    "1 x 1": ((1, 1), "kernel_shape = [1, 1]"),
    "half the size": ((3, 3), "pads = [1, 1, 1, 1], strides = [2, 2]"),
    "1 x 1, half the size": ((1, 1), "strides = [2, 2]"),
    "uneven": ((3, 2), "pads = [0, 1, 2, 0], strides = [1, 2]"),
    "no border": ((2, 3), "kernel_shape = [2, 3]"),
}


LARGEST = 2 ** (exact_weight_bits() - 1) - 1
"""Of the weights, so that this processor's products are exact."""
CHANNELS = {"r": np.full(6, 0.02, np.float32), "o": np.full(6, 101, np.uint8)}


def make_conv(kernel: tuple[int, int], attributes: str, *, bias: bool = True) -> ir.Model:
    random = np.random.default_rng(11)
    weights = {
        "w": random.integers(-LARGEST, LARGEST + 1, (9, 6, *kernel)).astype(np.int8),
        "t": random.uniform(1e-3, 1e-2, 9).astype(np.float32),
    }
    if bias:
        weights["b"] = random.normal(size=9).astype(np.float32)
    return make_model(CONV.format(attributes=attributes, bias=", b" if bias else ""), weights)


def make_feeds() -> list[dict[str, np.ndarray]]:
    """Two sizes; values beyond the range on both sides."""
    random = np.random.default_rng(13)
    return [{"x": random.uniform(-3, 4, (2, 6, *size)).astype(np.float32)} for size in ((5, 7), (8, 5))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KERNELS)
def test_computes_the_same(kind: str, bias: bool):
    model = make_conv(*KERNELS[kind], bias=bias)
    (report,) = apply_proven(LowerQuantisedConv(), model, make_feeds(), tolerance=1e-6)
    assert report.matched == 1
    assert "Conv" not in operators(model)
    assert "com.microsoft.MatMulIntegerToFloat" in operators(model)


def test_taps_are_taken_only_where_there_are_several():
    model = make_conv(*KERNELS["1 x 1"])
    LowerQuantisedConv().run(model)
    assert not {"Pad", "Slice", "Concat"} & set(operators(model))
    model = make_conv(*KERNELS["1 x 1, half the size"])
    LowerQuantisedConv().run(model)
    assert operators(model).count("Slice") == 1
    assert "Concat" not in operators(model)


def test_onnxruntime_keeps_the_integers(tmp_path: Path):
    model = make_conv(*KERNELS["3 x 3"])
    (feeds, _) = make_feeds()

    def optimised(path: Path) -> tuple[np.ndarray, set[str]]:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return session.run(None, feeds)[0], {node.op_type for node in ir.load(path).graph}

    # If convolutions of integers appear without the pass, ONNX Runtime has learnt them and the pass can go.
    expected, before = optimised(tmp_path / "before.onnx")
    assert before & {"Conv", "FusedConv"}
    LowerQuantisedConv().run(model)
    found, after = optimised(tmp_path / "after.onnx")
    assert "MatMulIntegerToFloat" in after
    assert not after & {"Conv", "FusedConv", "DequantizeLinear"}
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ("dilations = [2, 2]", "dilated"),
        ('auto_pad = "SAME_UPPER"', "auto_pad SAME_UPPER"),
    ],
)
def test_other_convolutions_are_left(attributes: str, reason: str):
    model = make_conv((3, 3), attributes)
    (report,) = apply_proven(LowerQuantisedConv(), model, make_feeds())
    assert report.matched == 0
    assert report.skipped[0].reason == reason


@pytest.mark.parametrize(
    ("old", "new", "weights", "reason"),
    [
        (
            "<axis = 0> (w, t)",
            "<axis = 1> (w, t)",
            {"t": np.full(6, 0.01, np.float32)},
            "expected one for each of 9 output channels",
        ),
        ("(w, t)", "(w, t, z)", {"z": np.full(9, 1, np.int8)}, "the weight has a zero point"),
        (
            "<axis = 0> (w, t)",
            "(w, s)",
            {"s": np.array(0.01, np.float32)},
            "expected one for each of 9 output channels",
        ),
        ("uint8 zero = {101}", "int8 zero = {-27}", {}, "the activations are not uint8"),
        ("(q, scale, zero)", "<axis = 1> (q, r, o)", CHANNELS, "the scale of the activations is not a single one"),
    ],
)
def test_other_quantisations_are_left(old: str, new: str, weights: dict[str, np.ndarray], reason: str):
    text = CONV.format(attributes="pads = [1, 1, 1, 1]", bias="")
    assert old in text
    random = np.random.default_rng(17)
    weights = {
        "w": random.integers(-127, 128, (9, 6, 3, 3)).astype(np.int8),
        **({} if "s" in weights else {"t": random.uniform(1e-3, 1e-2, 9).astype(np.float32)}),
        **weights,
    }
    model = make_model(text.replace(old, new), weights)
    (report,) = apply_proven(LowerQuantisedConv(), model, make_feeds())
    assert report.matched == 0
    assert reason in report.skipped[0].reason


def test_groups_are_left():
    text = CONV.format(attributes="group = 3", bias="")
    random = np.random.default_rng(19)
    weights = {"w": random.integers(-127, 128, (9, 2, 1, 1)).astype(np.int8), "t": np.full(9, 0.01, np.float32)}
    model = make_model(text, weights)
    (report,) = apply_proven(LowerQuantisedConv(), model, make_feeds())
    assert report.matched == 0
    assert report.skipped[0].reason == "3 groups"
