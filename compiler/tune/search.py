"""The search: ever more pictures for ever fewer ways; see the package. All here is arithmetic on measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdc.compiler.precision.budget import Measure
from sdc.compiler.tune.budget import Budget
from sdc.compiler.tune.choices import Choice, Space
from sdc.engines.preset import Way

AT_A_TIME = 4
"""Combinations that are measured before it is asked whether some are good enough."""

MOST_COMBINATIONS = 32
"""That are measured if none is."""

FEW, SOME = 1 / 8, 1 / 3
"""Parts of all pictures that ways alone, and combinations, are measured on at first."""

LEAST_PICTURES = {Measure.PSNR: 4, Measure.FRECHET: 128}
"""Fewer say nothing: the jackknife needs 4; of the judge's 64 features a covariance needs more than 64."""


@dataclass(frozen=True)
class Measurement:
    """What a way to draw with a bundle was found to be worth.

    Attributes:
        bundle: drew the pictures; as the user gave it.
        way: how.
        pictures: whose quality was measured.
        quality: in the budget's measure.
        noise: its standard deviation over seeds; 0 where that cannot be told.
        psnr_db: mean, of the same pictures to the reference's.
        seconds: of one picture, the median of some.
        ratio: of these to those of the reference, in turn; the median.
    """

    bundle: Path
    way: Way
    pictures: int
    quality: float
    noise: float
    psnr_db: float
    seconds: float
    ratio: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "bundle": str(self.bundle), "way": self.way.to_json()}

    @property
    def drawing(self) -> tuple[Path, Way]:
        """What was measured, on however many pictures."""
        return self.bundle, self.way


MeasureWay = Callable[[Way, int], Measurement]
"""Measures a way of one bundle on so many pictures."""


def fastest_within(measurements: Iterable[Measurement], budget: Budget) -> Measurement | None:
    """The fastest that keeps to the budget, of equally fast ones that with least harm; None if none does."""
    kept = [each for each in measurements if budget.allows(each.quality)]
    return min(kept, key=lambda each: (each.ratio, budget.harm(each.quality)), default=None)


def pareto_front(measurements: Iterable[Measurement], budget: Budget) -> list[Measurement]:
    """Those that no other beats, the fastest first: a slower one has to do less harm."""
    front: list[Measurement] = []
    for each in sorted(measurements, key=lambda each: (each.ratio, budget.harm(each.quality))):
        if not front or budget.harm(each.quality) < budget.harm(front[-1].quality):
            front.append(each)
    return front


def search(space: Space, measure: MeasureWay, budget: Budget, pictures: int) -> list[Measurement]:
    """All that was measured of one bundle, in order; of those `on_all` pictures one may be chosen.

    Args:
        space: what can be done.
        measure: called for one way after the other.
        budget: what pictures have to keep to.
        pictures: that the last ways are measured on.
    """
    few, some = (min(pictures, max(LEAST_PICTURES[budget.measure], round(part * pictures))) for part in (FEW, SOME))
    alone = {way: measure(way, few) for way in dict.fromkeys(map(space.way, (space.reference, *space.alone())))}
    by_choice = {choice: alone[space.way(choice)] for choice in (space.reference, *space.alone())}
    ranked = ranked_combinations(space, by_choice, budget)
    combined: list[Measurement] = []
    final: list[Measurement] = []
    for ways in _new_ways(space, ranked, known=set(alone)):
        found = [measure(way, some) for way in ways]
        combined += found
        final += _settle(found, measure, budget, pictures)
        if fastest_within(final, budget) is not None:
            break
    best = fastest_within(final, budget)
    faster = [each for each in alone.values() if best is None or each.ratio < best.ratio]
    final += _settle(faster, measure, budget, pictures)
    return [*alone.values(), *combined, *final]


def _new_ways(space: Space, ranked: Sequence[Choice], *, known: set[Way]) -> Iterator[list[Way]]:
    """Ways of choices, a few at a time, each once; made when it is their turn, as schedules have to be measured."""
    ways: list[Way] = []
    seen = set(known)
    for choice in ranked:
        way = space.way(choice)
        if way not in seen:
            seen.add(way)
            ways.append(way)
        if len(ways) == AT_A_TIME:
            yield ways
            ways = []
        if len(seen) - len(known) == MOST_COMBINATIONS:
            break
    if ways:
        yield ways


def _settle(found: Sequence[Measurement], measure: MeasureWay, budget: Budget, pictures: int) -> list[Measurement]:
    """Those that could be within the budget, on all pictures, the fastest first, up to one that is."""
    final = []
    for each in sorted(found, key=lambda each: each.ratio):
        if _could_keep_to(budget, each):
            final.append(measure(each.way, pictures))
            if budget.allows(final[-1].quality):
                break
    return final


def on_all(measurements: Iterable[Measurement], pictures: int) -> list[Measurement]:
    """Those on so many pictures."""
    return [each for each in measurements if each.pictures == pictures]


def _could_keep_to(budget: Budget, measured: Measurement) -> bool:
    return budget.allows(budget.hoped(measured.quality, measured.noise))


def ranked_combinations(space: Space, alone: Mapping[Choice, Measurement], budget: Budget) -> list[Choice]:
    """Several shortcuts at once that could keep to the budget, the fastest first, as far as can be told.

    Ratios of time are taken to multiply, and harm to add up; both of shortcuts alone, against the bundle without
    any: where it was measured beside another bundle, it has a ratio and a harm of its own.

    Args:
        space: what can be done.
        alone: measurements of the space's reference and of every single shortcut.
        budget: what pictures have to keep to.
    """
    plain = alone[space.reference]
    allowed = {choice for choice, found in alone.items() if _could_keep_to(budget, found)}
    ratios: dict[Choice, float] = {}
    for choice in space.all():
        shortcuts = choice.shortcuts(space.reference)
        if len(shortcuts) > 1 and allowed.issuperset(shortcuts):
            found = [alone[each] for each in shortcuts]
            if _may_add_up(plain, found, budget):
                ratios[choice] = plain.ratio * math.prod(each.ratio / plain.ratio for each in found)
    return sorted(ratios, key=ratios.__getitem__)


def _may_add_up(plain: Measurement, found: Sequence[Measurement], budget: Budget) -> bool:
    """Whether the harm without shortcuts and what each adds could be what the budget allows, each less by its noise."""

    def least(each: Measurement) -> float:
        return budget.harm(budget.hoped(each.quality, each.noise))

    added = sum(max(0.0, least(each) - least(plain)) for each in found)
    return least(plain) + added <= budget.harm(budget.limit)
