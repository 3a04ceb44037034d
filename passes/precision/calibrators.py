"""Ranges from histograms: percentile, entropy, and the least mean error of any power.

Why not the calibrators of `onnxruntime.quantization`: they read linear histograms only, their entropy search is a loop
in Python of a second and more for each tensor, and they have no search by the error. The divergence here is
theirs (and TensorRT's), over candidates that shrink by a constant factor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sdc.engines.errors import InputError
from sdc.passes.precision.log_histogram import Density, LogHistogram
from sdc.passes.precision.range_rules import ENTROPY, LP, MAX, METHODS, PERCENTILE, Range, RangeRule

_CANDIDATES = 2.0 ** (-np.arange(0, 97) / 16)
"""Shares of the whole range that are tried: each 4 % below the last, down to 1/64."""

_LEVELS = 255
"""Integers of a range: -127 to 127 for a symmetric one; one fewer than 8 bits hold."""

_SPLIT = 8
"""Bins of the divergence for each integer. Source: NVIDIA, "8-bit inference with TensorRT", GTC 2017: 2048 to 128."""

_LITTLE = 1e-4
"""Mass that stands for none where the divergence would be infinite. Source: as in onnxruntime.quantization."""

_GAUSS = (0.5 - 0.5 / np.sqrt(3.0), 0.5 + 0.5 / np.sqrt(3.0))
"""Points that stand for a bin. Source: Gauss-Legendre quadrature of order 2 on [0, 1]."""


def range_from_histogram(histogram: LogHistogram, seen: Range, rule: RangeRule) -> Range:
    """The range of one tensor.

    Args:
        histogram: of its values, or of an even part of them.
        seen: the smallest and the largest of all values.
        rule: method and kind of range.

    Returns:
        A range that holds zero and lies within `seen`, widened to zero, or its symmetric hull.

    Raises:
        InputError: the rule is that of dynamic ranges.
    """
    if rule.method not in METHODS:
        raise InputError(f"no range follows from a calibration by {rule.label}", hint="ask for a static range")
    whole = Range(min(seen.low, 0.0), max(seen.high, 0.0))
    limit = max(-whole.low, whole.high)
    if rule.symmetric:
        whole = Range(-limit, limit)
    if rule.method == MAX or limit == 0 or histogram.total == 0:
        return whole
    density = histogram.density(seen.low, seen.high)
    if rule.method == PERCENTILE:
        return _percentile(density, whole, rule)
    if rule.method == ENTROPY:
        return _least(partial(_divergence, density), whole, symmetric=rule.symmetric)
    exponent = rule.exponent if rule.method == LP else 2.0
    return _least(_error(density, exponent), whole, symmetric=rule.symmetric)


def _percentile(density: Density, whole: Range, rule: RangeRule) -> Range:
    """A symmetric range leaves the largest magnitudes out, any other half as many at each end."""
    outside = 1 - rule.percentile / 100
    if rule.symmetric:
        limit = _quantile(density.folded(), 1 - outside)
        return Range(-limit, limit)
    low, high = _quantile(density, outside / 2), _quantile(density, 1 - outside / 2)
    return Range(max(whole.low, min(low, 0.0)), min(whole.high, max(high, 0.0)))


def _quantile(density: Density, share: float) -> float:
    """The value below which `share` of all lie."""
    upto = np.cumsum(density.counts)
    wanted = share * upto[-1]
    index = min(int(np.searchsorted(upto, wanted)), len(upto) - 1)
    within = (wanted - (upto[index] - density.counts[index])) / density.counts[index]
    return float(density.begins[index] + min(max(within, 0.0), 1.0) * (density.ends[index] - density.begins[index]))


def _least(cost: Callable[[float, float], float], whole: Range, *, symmetric: bool) -> Range:
    """The candidate of the least cost; ends of an asymmetric range are tried in turn, the farther one first, twice."""
    if symmetric:
        limits = _CANDIDATES * whole.high
        best = float(limits[int(np.argmin([cost(-limit, limit) for limit in limits]))])
        return Range(-best, best)
    low, high = whole
    for _ in range(2):
        for end in ("high", "low") if whole.high >= -whole.low else ("low", "high"):
            if end == "high" and whole.high > 0:
                tried = _CANDIDATES * whole.high
                high = float(tried[int(np.argmin([cost(low, each) for each in tried]))])
            elif end == "low" and whole.low < 0:
                tried = _CANDIDATES * whole.low
                low = float(tried[int(np.argmin([cost(each, high) for each in tried]))])
    return Range(low, high)


def _error(density: Density, exponent: float) -> Callable[[float, float], float]:
    """Sum of powers of what rounding and saturation change, by the ends of the range."""
    widths = density.ends - density.begins
    points = np.concatenate([density.begins + share * widths for share in _GAUSS])
    counts = np.tile(density.counts / len(_GAUSS), len(_GAUSS))

    def cost(low: float, high: float) -> float:
        step = (high - low) / (_LEVELS - 1)
        scaled = points / step
        rounded = np.minimum(np.maximum(np.rint(scaled), np.rint(low / step)), np.rint(high / step))
        return float(np.dot(counts, _power(np.abs(scaled - rounded), exponent)) * step**exponent)

    return cost


def _power(values: NDArray[np.float64], exponent: float) -> NDArray[np.floating]:
    """Powers of numbers from 0. But for squares they have the digits of float32: NumPy's powers of float64 take
    twenty times as long on processors without AVX-512."""
    if exponent == 2:
        return values * values
    with np.errstate(divide="ignore"):
        logarithms = np.log(values.astype(np.float32))
    return np.exp(np.float32(exponent) * logarithms)


def _divergence(density: Density, low: float, high: float) -> float:
    """Kullback-Leibler divergence of the quantised distribution from the saturated one, in nats.

    Source: NVIDIA, "8-bit inference with TensorRT", GTC 2017: what lies outside counts for the outermost bins of the
    reference and not at all for the quantised distribution, which spreads the mass of each integer over its bins.
    """
    edges = np.linspace(low, high, _LEVELS * _SPLIT + 1)
    below = density.below(edges)
    inside = np.diff(below)
    reference = inside.copy()
    reference[0] += below[0]
    reference[-1] += density.total - below[-1]
    groups = inside.reshape(_LEVELS, _SPLIT)
    filled = groups > 0
    spread = groups.sum(axis=1, keepdims=True) / np.maximum(filled.sum(axis=1, keepdims=True), 1) * filled
    return _kl(reference, spread.reshape(-1))


def _kl(reference: NDArray[np.float64], approximation: NDArray[np.float64]) -> float:
    mass, other = reference.sum(), approximation.sum()
    if mass == 0 or other == 0:
        return np.inf
    p, q = reference / mass, np.maximum(approximation / other, _LITTLE / len(approximation))
    q /= q.sum()
    present = p > 0
    return float(np.sum(p[present] * np.log(p[present] / q[present])))
