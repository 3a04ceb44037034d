"""How the range of a tensor follows from what was seen of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sdc.engines.errors import InputError

MAX = "max"
PERCENTILE = "percentile"
ENTROPY = "entropy"
MSE = "mse"
METHODS = (MAX, PERCENTILE, ENTROPY, MSE)

DEFAULT_PERCENTILE = 99.99


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
            Kullback-Leibler divergence), or "mse" (the least mean squared error).
        percentile: share of the values inside, for "percentile".
        symmetric: zero stands in the middle and its integer is 0; else the range begins and ends where the values do,
            and zero has an integer of its own.
    """

    method: str = MAX
    percentile: float = DEFAULT_PERCENTILE
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"unknown calibration {self.method!r}", hint=f"choose one of {', '.join(METHODS)}")
        if not 50 < self.percentile <= 100:
            raise InputError(f"a percentile of {self.percentile:g}", hint="give one above 50, up to 100")

    @property
    def label(self) -> str:
        """As `parse_rule` reads it, with the kind of range: ``percentile:99.99, symmetric``."""
        method = f"{self.method}:{self.percentile:g}" if self.method == PERCENTILE else self.method
        return f"{method}, {'symmetric' if self.symmetric else 'asymmetric'}"


DEFAULT_RULE = RangeRule()


def parse_rule(text: str, *, symmetric: bool = True) -> RangeRule:
    """Read ``max``, ``percentile``, ``percentile:99.9``, ``entropy`` or ``mse``.

    Raises:
        InputError: it is none of these.
    """
    method, colon, number = text.partition(":")
    if not colon:
        return RangeRule(method, symmetric=symmetric)
    if method != PERCENTILE:
        raise InputError(f"{method!r} takes no number", hint="write percentile:99.99, or the method alone")
    try:
        percentile = float(number)
    except ValueError as error:
        raise InputError(f"{number!r} is no percentile", hint="write percentile:99.99") from error
    return RangeRule(method, percentile, symmetric)
