"""Ranges from histograms against brute force over the values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from sdc.engines.errors import InputError
from sdc.passes.precision.activation_qdq import affine_from_range
from sdc.passes.precision.calibrators import range_from_histogram
from sdc.passes.precision.log_histogram import LogHistogram
from sdc.passes.precision.range_rules import METHODS, Range, RangeRule, parse_rule

BIN = 1 / 127
"""Relative width of a histogram's bin."""


def bell(count: int = 60_001) -> np.ndarray:
    """A normal distribution, lopsided, with rare values far out."""
    random = np.random.default_rng(67)
    x = random.normal(0.3, 1.0, count)
    x[:: count // 20] *= 12
    return x.astype(np.float32)


def silu(count: int = 60_001) -> np.ndarray:
    x = np.random.default_rng(71).normal(0, 2, count)
    return (x / (1 + np.exp(-x))).astype(np.float32)


def find(x: np.ndarray, rule: RangeRule) -> Range:
    histogram = LogHistogram()
    histogram.add(x)
    return range_from_histogram(histogram, Range(float(x.min()), float(x.max())), rule)


def error_of(x: np.ndarray, found: Range, *, symmetric: bool) -> float:
    """Mean squared error of real integers."""
    scale, zero = affine_from_range(found, symmetric=symmetric)
    integers = np.clip(np.rint(x / scale) + zero, -128, 127)
    return float(np.mean(np.square((integers - zero) * scale - x, dtype=np.float64)))


def test_max_is_all_that_was_seen():
    x = silu()
    limit = float(x.max())
    assert find(x, RangeRule("max")) == (-limit, limit)
    assert find(x, RangeRule("max", symmetric=False)) == (float(x.min()), limit)


@pytest.mark.parametrize("share", [90.0, 99.0, 99.9])
def test_percentile_is_numpys(share: float):
    x = bell()
    low, high = find(x, RangeRule("percentile", share))
    assert low == -high
    assert high == pytest.approx(np.percentile(np.abs(x), share), rel=BIN)
    low, high = find(x, RangeRule("percentile", share, symmetric=False))
    assert low == pytest.approx(np.percentile(x, (100 - share) / 2), rel=BIN)
    assert high == pytest.approx(np.percentile(x, 100 - (100 - share) / 2), rel=BIN)


@pytest.mark.parametrize("make", [bell, silu])
def test_squared_error_is_the_least(make):
    x = make()
    found = find(x, RangeRule("mse"))
    limits = np.abs(x).max() * np.linspace(0.01, 1, 400)
    least = min(error_of(x, Range(-limit, limit), symmetric=True) for limit in limits)
    # Candidates are 4 % apart, and the minimum is flat.
    assert error_of(x, found, symmetric=True) <= 1.02 * least
    assert found.high < 0.9 * np.abs(x).max() or make is silu


def test_squared_error_of_both_ends_is_the_least():
    x = bell()
    found = find(x, RangeRule("mse", symmetric=False))
    ends = [(low, high) for low in np.linspace(0.1, 1, 40) for high in np.linspace(0.1, 1, 40)]
    least = min(error_of(x, Range(low * float(x.min()), high * float(x.max())), symmetric=False) for low, high in ends)
    assert error_of(x, found, symmetric=False) <= 1.05 * least


def divergence_of(x: np.ndarray, limit: float) -> float:
    """TensorRT's divergence of a symmetric threshold, from the values: 8 bins for each of 255 integers."""
    inside = np.histogram(x[np.abs(x) <= limit], 255 * 8, (-limit, limit))[0].astype(float)
    reference = inside.copy()
    reference[0] += (x < -limit).sum()
    reference[-1] += (x > limit).sum()
    spread = np.zeros_like(inside)
    for level in range(255):
        part = slice(8 * level, 8 * level + 8)
        filled = inside[part] > 0
        if filled.any():
            spread[part][filled] = inside[part].sum() / filled.sum()
    p, q = reference / reference.sum(), np.maximum(spread / spread.sum(), 1e-4 / len(spread))
    return float(sum(a * np.log(a / b) for a, b in zip(p, q / q.sum(), strict=True) if a > 0))


def test_entropy_is_nearly_the_least_divergence():
    x = bell(2_000_001)
    low, high = find(x, RangeRule("entropy"))
    assert low == -high
    limits = np.abs(x).max() * 2.0 ** (-np.arange(0, 97) / 16)
    divergences = [divergence_of(x, float(limit)) for limit in limits]
    # The histogram has two bins for each integer near the limit, the brute force eight.
    best = float(limits[int(np.argmin(divergences))])
    assert best / 1.6 < high < best * 1.6
    assert divergence_of(x, high) - min(divergences) < 0.1 * (divergences[0] - min(divergences))


def test_outliers_move_max_alone():
    x = bell()
    ranges = {method: find(x, RangeRule(method)).high for method in METHODS}
    assert ranges["max"] > 1.4 * max(ranges["percentile"], ranges["entropy"])
    assert ranges["max"] > ranges["mse"] > 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_hold_zero_and_stay_within_what_was_seen(method: str, symmetric: bool):
    for x in (bell(), silu(), np.abs(bell()) + 1, -np.abs(bell()) - 1):
        low, high = find(x, RangeRule(method, symmetric=symmetric))
        assert low <= 0 <= high
        assert high - low > 0
        limit = float(np.abs(x).max())
        assert -low <= (limit if symmetric else max(0.0, -float(x.min())))
        assert high <= (limit if symmetric else max(0.0, float(x.max())))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_of_zero(method: str, symmetric: bool):
    assert find(np.zeros(13, np.float32), RangeRule(method, symmetric=symmetric)) == (0, 0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_larger_powers_of_errors_cut_less_off(symmetric: bool):
    x = np.random.default_rng(3).standard_t(4, 50_000).astype(np.float32)
    square = find(x, RangeRule("mse", symmetric=symmetric))
    assert find(x, RangeRule("lp", symmetric=symmetric, exponent=2.0)) == square
    widths = [
        (lambda found: found[1] - found[0])(find(x, RangeRule("lp", symmetric=symmetric, exponent=exponent)))
        for exponent in (1.0, 2.0, 2.4, 4.0)
    ]
    assert widths == sorted(widths)
    assert widths[0] < widths[2] < widths[3]


def test_rules_are_read():
    assert parse_rule("mse", symmetric=False) == RangeRule("mse", symmetric=False)
    assert parse_rule("percentile:99.9") == RangeRule("percentile", 99.9)
    assert parse_rule("percentile").label == "percentile:99.99, symmetric"
    labels = {RangeRule(method, symmetric=kind).label for method in METHODS for kind in (True, False)}
    assert parse_rule("lp:3") == RangeRule("lp", exponent=3)
    assert parse_rule("lp").label == "lp:2.4, symmetric"
    assert len(labels) == 10


@pytest.mark.parametrize(
    "text",
    ["kl", "", "max:3", "percentile:", "percentile:50", "percentile:100.1", "percentile:x", "lp:", "lp:0", "lp:9"],
)
def test_what_is_no_rule_is_refused(text: str):
    with pytest.raises(InputError):
        parse_rule(text)
