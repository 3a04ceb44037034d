"""Bias correction: mean outputs with rounded weights are those with exact ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import make_feeds, make_fused_denoiser, make_model, measure_table, quantise_everything, run_model

from sdc.engines.errors import PassError
from sdc.passes.precision.correct_bias import CorrectBias, dequantised_constant
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.range_rules import RangeRule

HEAD = '<ir_version: 10, opset_import: ["": 23]> g (float[2, 6, 5, 7] x) => (float[A, B, C, D] y)'
CASES = {
    "conv": ("y = Conv (x, w, b)", (9, 6, 2, 3), 1),
    "conv-without-bias": ("y = Conv (x, w)", (9, 6, 2, 3), 1),
    "matmul": ("m = MatMul (x, w) y = Add (m, b)", (7, 9), -1),
    "matmul-bias-first": ("m = MatMul (x, w) y = Add (b, m)", (7, 9), -1),
    "gemm": ("r = Reshape (x, rows) y2 = Gemm (r, w, b) y = Reshape (y2, back)", (7, 9), -1),
    "gemm-transposed": ("r = Reshape (x, rows) y2 = Gemm <transB = 1> (r, w, b) y = Reshape (y2, back)", (9, 7), -1),
}


def make_case(name: str) -> tuple[ir.Model, dict[str, np.ndarray], int]:
    body, shape, axis = CASES[name]
    random = np.random.default_rng(103)
    weights = {"w": random.normal(size=shape).astype(np.float32), "b": random.normal(size=9).astype(np.float32)}
    constants = {"rows": np.array([-1, 7]), "back": np.array([2, 6, 5, 9])} if "gemm" in name else {}
    model = make_model(f"{HEAD} {{ {body} }}", weights | constants)
    means = random.normal(0, 3, (1, 6, 1, 1) if "conv" in name else (1, 1, 1, 7))
    return model, {"x": (means + random.normal(size=(2, 6, 5, 7))).astype(np.float32)}, axis


@pytest.mark.parametrize("name", CASES)
def test_means_are_those_of_the_exact_weight(name: str):
    model, feeds, axis = make_case(name)
    (exact,) = run_model(model, feeds)
    table = measure_table(model, feeds)
    others = tuple(i for i in range(4) if i != axis % 4)
    errors = {}
    for correct in (False, True):
        quantised = model.clone()
        # Weights of 3 bits, so that their rounding is what is seen.
        quantise_everything(quantised, table, rule=RangeRule(weight_bits=3))
        if correct:
            assert CorrectBias(table).run(quantised).matched == 1
            assert CorrectBias(table).run(quantised).matched == 0
        (found,) = run_model(quantised, feeds)
        errors[correct] = np.abs((found - exact).mean(axis=others)).max()
    # What is left comes from rounding activations, and for a convolution from windows that see a part of the tensor.
    assert errors[True] < (0.5 if "conv" in name else 0.1) * errors[False]


def test_network_gets_closer_on_average():
    model, feeds = make_fused_denoiser(), make_feeds()
    table = measure_table(model, feeds)
    InsertQdq(table, rule=RangeRule(weight_bits=4)).run(model)
    report = CorrectBias(table).run(model)
    # Three Convs and an attention's output projection have a bias or can have one; query, key and value have none.
    reasons = [skipped.reason for skipped in report.skipped]
    assert sum("one more operator" in reason for reason in reasons) == 3
    assert report.matched == 9 - len(reasons)


def test_what_has_no_place_for_a_bias_is_left():
    text = f"{HEAD} {{ m = MatMul (x, w) y = Neg (m) }}"
    model = make_model(text, {"w": np.random.default_rng(107).normal(size=(7, 9)).astype(np.float32)})
    feeds = make_case("matmul")[1]
    table = measure_table(model, feeds)
    quantise_everything(model, table)
    report = CorrectBias(table).run(model)
    assert (report.matched, len(report.skipped)) == (0, 1)


def test_gemm_that_scales_is_left():
    text = f"{HEAD} {{ r = Reshape (x, rows) y2 = Gemm <beta = 0.5> (r, w, b) y = Reshape (y2, back) }}"
    random = np.random.default_rng(109)
    weights = {"w": random.normal(size=(7, 9)).astype(np.float32), "b": random.normal(size=9).astype(np.float32)}
    model = make_model(text, weights | {"rows": np.array([-1, 7]), "back": np.array([2, 6, 5, 9])})
    table = measure_table(model, make_case("gemm")[1])
    quantise_everything(model, table)
    report = CorrectBias(table).run(model)
    assert (report.matched, report.skipped[0].reason) == (0, "a Gemm that scales its product or its bias")


def test_other_readers_of_a_shared_bias_keep_it():
    text = HEAD.replace("y)", "y, float[9] z)") + " { m = MatMul (x, w) y = Add (m, b) z = Neg (b) }"
    model, feeds, _ = make_case("matmul")
    weights = {name: model.graph.initializers[name].const_value.numpy() for name in ("w", "b")}
    shared = make_model(text, weights)
    table = measure_table(shared, feeds)
    quantise_everything(shared, table, rule=RangeRule(weight_bits=3))
    assert CorrectBias(table).run(shared).matched == 1
    np.testing.assert_array_equal(run_model(shared, feeds)[1], -weights["b"])


def test_missing_means_are_refused():
    model, feeds, _ = make_case("matmul")
    table = measure_table(model, feeds)
    quantise_everything(model, table)
    with pytest.raises(PassError, match="no range for tensor 'x'"):
        CorrectBias(type(table).from_json(table.to_json() | {"tensors": {}})).run(model)


@pytest.mark.parametrize(
    ("attributes", "scale", "zero"),
    [("axis = 0", (6,), None), ("axis = 1", (4,), (4,)), ("axis = 0, block_size = 2", (3, 4), (3, 4)), ("", (), None)],
)
def test_dequantised_constants_are_onnx_runtimes(attributes: str, scale: tuple[int, ...], zero: tuple[int, ...] | None):
    random = np.random.default_rng(113)
    weights = {
        "q": random.integers(-128, 128, (6, 4)).astype(np.int8),
        "s": np.asarray(random.uniform(0.1, 2, scale), np.float32),
    }
    if zero is not None:
        weights["z"] = random.integers(-9, 9, zero).astype(np.int8)
    inner = f"d = DequantizeLinear {f'<{attributes}>' if attributes else ''} (q, s{', z' if zero else ''})"
    text = '<ir_version: 10, opset_import: ["": 23]> g (float[6, 4] x) => (float[6, 4] y)'
    model = make_model(f"{text} {{ {inner} y = Add (x, d) }}", weights)
    (expected,) = run_model(model, {"x": np.zeros((6, 4), np.float32)})
    np.testing.assert_allclose(dequantised_constant(model.graph[0]), expected, rtol=1e-6)
