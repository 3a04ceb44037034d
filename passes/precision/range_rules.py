"""How the range of a tensor follows from what was seen of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sdc.engines.errors import InputError

MAX = "max"
PERCENTILE = "percentile"
ENTROPY = "entropy"
MSE = "mse"
LP = "lp"
DYNAMIC = "dynamic"
METHODS = (MAX, PERCENTILE, ENTROPY, MSE, LP)
"""Of static ranges."""

DEFAULT_PERCENTILE = 99.99

DEFAULT_EXPONENT = 2.4
"""Source: Wei et al., "QDrop", arXiv:2203.05740, whose code searches scales by the 2.4th power of errors, after Nahshan
et al., "Loss Aware Post-training Quantization", arXiv:1911.07190. What saturates weighs more than in squares."""


class Range(NamedTuple):
    """What maps to integers; values outside saturate.

    Attributes:
        low: the smallest value, at most 0.
        high: the largest, at least 0.
    """

    low: float
    high: float


@dataclass(frozen=True)
class RangeRule:
    """A method and its options.

    Attributes:
        method: "max" (everything that was seen), "percentile" (all but a share of the values), "entropy" (the least
            Kullback-Leibler divergence), "mse" (the least mean squared error), "lp" (of another power), or "dynamic"
            (no range at all: the engine takes each tensor's lowest and highest value in each run; asymmetric).
        percentile: share of the values inside, for "percentile".
        exponent: power of the errors, for "lp".
        symmetric: zero stands in the middle and its integer is 0; else the range begins and ends where the values do,
            and zero has an integer of its own.
        results: whether what a quantised convolution writes is quantised too, each channel in a range a
            tenth wider than the one that it was seen in.
        weight_bits: of the layers' weights, 2 to 8, in int8 storage: b bits hold -(2^(b-1) - 1) to 2^(b-1) - 1. With 7
            no pair of products with an activation of 8 bits leaves 16 bits. 4 is the known-bad control of evaluations.
    """

    method: str = MAX
    percentile: float = DEFAULT_PERCENTILE
    symmetric: bool = True
    exponent: float = DEFAULT_EXPONENT
    results: bool = False
    weight_bits: int = 8

    def __post_init__(self) -> None:
        if self.method not in (*METHODS, DYNAMIC):
            raise InputError(
                f"unknown calibration {self.method!r}", hint=f"choose one of {', '.join((*METHODS, DYNAMIC))}"
            )
        if not 50 < self.percentile <= 100:
            raise InputError(f"a percentile of {self.percentile:g}", hint="give one above 50, up to 100")
        if self.method == DYNAMIC and self.symmetric:
            raise InputError("dynamic ranges are asymmetric", hint="leave out --activations symmetric")
        if not 1 <= self.exponent <= 8:
            raise InputError(f"errors to the power of {self.exponent:g}", hint="give an exponent from 1 to 8")
        if not 2 <= self.weight_bits <= 8:
            raise InputError(f"weights of {self.weight_bits} bits", hint="ask for 2 to 8 bits")

    @property
    def label(self) -> str:
        """As `parse_rule` reads it, with the kind of range: ``percentile:99.99, symmetric``."""
        numbers = {PERCENTILE: f":{self.percentile:g}", LP: f":{self.exponent}"}
        return f"{self.method}{numbers.get(self.method, '')}, {'symmetric' if self.symmetric else 'asymmetric'}"


DEFAULT_RULE = RangeRule()


def parse_rule(text: str, *, symmetric: bool = True) -> RangeRule:
    """Read ``max``, ``percentile``, ``percentile:99.9``, ``entropy``, ``mse``, ``lp``, ``lp:2.4`` or ``dynamic``.

    Raises:
        InputError: it is none of these.
    """
    method, colon, number = text.partition(":")
    if not colon:
        return RangeRule(method, symmetric=symmetric)
    if method not in (PERCENTILE, LP):
        raise InputError(f"{method!r} takes no number", hint="write percentile:99.99, lp:2.4, or the method alone")
    try:
        value = float(number)
    except ValueError as error:
        what = "percentile" if method == PERCENTILE else "exponent"
        raise InputError(f"{number!r} is no {what}", hint="write percentile:99.99 or lp:2.4") from error
    if method == LP:
        return RangeRule(method, symmetric=symmetric, exponent=value)
    return RangeRule(method, value, symmetric)
