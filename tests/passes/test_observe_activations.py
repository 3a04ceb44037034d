"""What an observed graph tells, against NumPy."""

from __future__ import annotations

from math import gcd

import numpy as np
import pytest
from small_denoiser import make_model, run_model

from sdc.engines.errors import PassError
from sdc.passes.precision.observe_activations import (
    MAXIMA,
    MEANS,
    MINIMA,
    ObserveActivations,
    Observed,
    samples_name,
    strides,
)

TEXT = """<ir_version: 10, opset_import: ["": 23]> g (float[N, 6, 5, 7] x) => (float[N, 6, 5, 7] y)
    { h = Neg (x) y = Exp (h) }"""


def test_observed_graph_gains_outputs():
    model = make_model(TEXT, {})
    tensors = (Observed("h", 6, 2), Observed("x", 7))
    assert ObserveActivations(tensors).run(model).matched == 2
    names = [value.name for value in model.graph.outputs]
    assert names == ["y", samples_name(0), samples_name(1), MINIMA, MAXIMA, MEANS]
    x = np.random.default_rng(127).normal(0.3, 1, (3, 6, 5, 7)).astype(np.float32)
    y, first, second, minima, maxima, means = run_model(model, {"x": x})
    np.testing.assert_allclose(y, np.exp(-x), rtol=1e-6)
    np.testing.assert_array_equal(first, -x.ravel())
    np.testing.assert_array_equal(second, x.ravel())
    for found, reduce in ((minima, np.min), (maxima, np.max), (means, np.mean)):
        expected = np.concatenate([reduce(-x, axis=(0, 2, 3)), reduce(x, axis=(0, 1, 2))])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_tensors_are_read_where_they_are_written():
    model = make_model(TEXT, {})
    ObserveActivations((Observed("h", 6, 2), Observed("x", 6, 2))).run(model)
    reads = ["ReduceMin", "ReduceMax", "ReduceMean", "Reshape", "Shape", "Div", "Min", "Gather", "Slice"]
    expected = [*reads, "Neg", *reads, "Exp", "Concat", "Concat", "Concat"]
    assert [node.op_type for node in model.graph] == expected


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_samples_are_few_and_meet_every_channel(rows: int):
    model = make_model(TEXT, {})
    limit = 210 * 2
    ObserveActivations((Observed("h", 6, 2),), sample_limit=limit).run(model)
    x = np.tile(np.arange(210, dtype=np.float32).reshape(1, 6, 5, 7), (rows, 1, 1, 1))
    _, samples, *_ = run_model(model, {"x": x})
    assert len(samples) <= limit or rows <= 2
    assert len(samples) >= min(x.size, limit) / 12
    assert {int(-value) // 35 for value in samples} == set(range(6))
    assert len(set(samples.tolist())) > 30


def test_strides_share_no_factor_with_channels():
    found = strides(300)
    assert found[0] == 1
    assert all(step > quotient and gcd(step, 210) == 1 for quotient, step in enumerate(found))


def test_tensors_that_are_not_there_are_refused():
    with pytest.raises(PassError, match=r"1 of 2 tensors: \['z'\]"):
        ObserveActivations((Observed("x", 7), Observed("z", 7))).run(make_model(TEXT, {}))
    with pytest.raises(PassError, match="0 of 0"):
        ObserveActivations(()).run(make_model(TEXT, {}))
