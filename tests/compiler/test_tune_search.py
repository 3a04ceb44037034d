"""The search of `sdc tune` on made-up ways, whose harm and time are known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdc.compiler.precision.budget import Measure
from sdc.compiler.tune.budget import Budget, parse_budget
from sdc.compiler.tune.choices import Abilities, Caching, Choice, Course, Space
from sdc.compiler.tune.kept import NAME, KeptMeasurements, read_measurements
from sdc.compiler.tune.search import (
    AT_A_TIME,
    MOST_COMBINATIONS,
    Measurement,
    fastest_within,
    on_all,
    pareto_front,
    ranked_combinations,
    search,
)
from sdc.engines.errors import InputError
from sdc.engines.preset import Way

BUNDLE = Path("bundle")
REFERENCE = Way("ddim", 20, 3.0)
EVERYTHING = Abilities(lcm=True, deepcache=True, intervals=True)
PICTURES = 1000
BUDGETS = [Budget(Measure.FRECHET, 1.0), Budget(Measure.PSNR, 30.0)]


def first_half(way: Way, count: int) -> tuple[int, ...]:
    """Whole steps at the beginning: unlike any even schedule of several."""
    return tuple(range(count))


def space(abilities: Abilities = EVERYTHING, reference: Way = REFERENCE) -> Space:
    return Space.around(reference, abilities, first_half)


def measured(way: Way, quality: float, ratio: float, *, pictures: int = PICTURES, noise: float = 0.0) -> Measurement:
    return Measurement(BUNDLE, way, pictures, quality, noise, 0.0, ratio, ratio)


def made_up_ratio(way: Way) -> float:
    """Work of the UNet: half of it without guidance, a tenth in a shallow step."""
    guided = 0 if way.guidance_scale <= 1 else (way.guidance_steps or (0, way.steps))[1]
    whole = 1.0
    if way.deepcache != 1:
        count = len(way.deepcache) if isinstance(way.deepcache, tuple) else math.ceil(way.steps / way.deepcache)
        whole = (count + 0.1 * (way.steps - count)) / way.steps
    return (0.5 * way.steps + 0.5 * guided) / REFERENCE.steps * whole


class MadeUp:
    """Measures by a formula, and remembers what was asked for."""

    def __init__(self, budget: Budget, weight: float = 1.0) -> None:
        self.budget = budget
        self.weight = weight
        self.asked: list[tuple[Way, int]] = []

    def harm(self, way: Way) -> float:
        return self.weight * (1 - made_up_ratio(way)) ** 2

    def __call__(self, way: Way, pictures: int) -> Measurement:
        self.asked.append((way, pictures))
        harm = self.harm(way)
        limit = self.budget.harm(self.budget.limit)
        quality = limit * harm
        if self.budget.measure is Measure.PSNR:
            quality = 100.0 if harm == 0 else -10 * math.log10(quality)
        return measured(way, quality, made_up_ratio(way), pictures=pictures)


MEASUREMENTS = st.lists(
    st.builds(
        measured,
        st.builds(Way, st.just("ddim"), st.integers(1, 50), st.just(3.0)),
        st.floats(-50, 90),
        st.floats(0.01, 2),
    ),
    max_size=12,
)


@given(MEASUREMENTS, st.sampled_from(BUDGETS))
def test_the_chosen_one_is_the_fastest_within_the_budget(found: list[Measurement], budget: Budget) -> None:
    chosen = fastest_within(found, budget)
    kept = [each for each in found if budget.allows(each.quality)]
    assert (chosen is None) == (not kept)
    if chosen is not None:
        assert chosen in kept
        assert chosen.ratio == min(each.ratio for each in kept)


@given(MEASUREMENTS, st.sampled_from(BUDGETS))
def test_nothing_beats_what_is_on_the_front(found: list[Measurement], budget: Budget) -> None:
    front = pareto_front(found, budget)

    def beats(one: Measurement, other: Measurement) -> bool:
        ours, theirs = ((each.ratio, budget.harm(each.quality)) for each in (one, other))
        return ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1]

    assert all(not beats(other, each) for each in front for other in found)
    missing = [each for each in found if each not in front]
    assert all(any(beats(other, each) or made_equal(other, each, budget) for other in front) for each in missing)


def made_equal(one: Measurement, other: Measurement, budget: Budget) -> bool:
    return (one.ratio, budget.harm(one.quality)) == (other.ratio, budget.harm(other.quality))


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("weight", [0.5, 1.5, 4.0])
def test_the_search_ends_with_a_way_within_the_budget(budget: Budget, weight: float) -> None:
    measure = MadeUp(budget, weight)
    found = search(space(), measure, budget, PICTURES)
    assert [(each.way, each.pictures) for each in found] == measure.asked
    chosen = fastest_within(on_all(found, PICTURES), budget)
    assert chosen is not None
    single = [space().way(choice) for choice in space().alone()]
    within = [way for way in single if measure.harm(way) <= 1]
    assert chosen.ratio <= min(map(made_up_ratio, [REFERENCE, *within])), "no slower than any shortcut alone"
    assert chosen.ratio < 1


def test_combinations_are_measured_and_chosen() -> None:
    budget = BUDGETS[0]
    found = search(space(), MadeUp(budget, 0.6), budget, PICTURES)
    chosen = fastest_within(on_all(found, PICTURES), budget)
    assert chosen is not None
    assert chosen.way not in {space().way(choice) for choice in space().alone()}


def test_few_ways_get_all_pictures() -> None:
    measure = MadeUp(BUDGETS[0], 4.0)
    search(space(), measure, BUDGETS[0], PICTURES)
    counts = [pictures for _, pictures in measure.asked]
    assert set(counts) <= {128, 333, 1000}
    assert counts.count(1000) < counts.count(333) + counts.count(128)
    assert counts.count(333) <= MOST_COMBINATIONS
    assert measure.asked[0] == (REFERENCE, 128)


def test_the_reference_is_chosen_where_every_shortcut_harms_too_much() -> None:
    budget = BUDGETS[1]
    found = search(space(), MadeUp(budget, 1e6), budget, PICTURES)
    chosen = fastest_within(on_all(found, PICTURES), budget)
    assert chosen is not None
    assert chosen.way == REFERENCE


def test_nothing_is_chosen_where_not_even_the_reference_is_within() -> None:
    """As with another bundle's reference."""
    budget = BUDGETS[0]
    found = search(space(), lambda way, pictures: measured(way, 1.5, 1.0, pictures=pictures), budget, PICTURES)
    assert fastest_within(found, budget) is None
    assert on_all(found, PICTURES) == []


def test_what_could_be_noise_gets_more_pictures() -> None:
    """Out by less than a standard deviation on few pictures, and within on all."""
    budget = BUDGETS[0]

    def measure(way: Way, pictures: int) -> Measurement:
        quality, noise = (0.9, 0.1) if pictures == PICTURES else (1.2, 0.3)
        return measured(way, 0.0 if way == REFERENCE else quality, way.steps / 20, pictures=pictures, noise=noise)

    plain = space(Abilities(lcm=False, deepcache=False, intervals=False))
    chosen = fastest_within(on_all(search(plain, measure, budget, PICTURES), PICTURES), budget)
    assert chosen is not None
    assert chosen.way == Way("ddim", 4, 3.0)


def test_combinations_of_what_is_out_alone_are_not_tried() -> None:
    budget = BUDGETS[0]
    place = space()
    alone = {choice: measured(place.way(choice), 0.1, 0.9) for choice in place.alone()}
    alone[place.reference] = measured(REFERENCE, 0.0, 1.0)
    out = replace(place.reference, caching=Caching(5))
    alone[out] = measured(place.way(out), 1.5, 0.5)
    ranked = ranked_combinations(place, alone, budget)
    assert ranked
    assert all(choice.caching != Caching(5) for choice in ranked)
    ratios = [0.9 ** len(choice.shortcuts(place.reference)) for choice in ranked]
    assert ratios == sorted(ratios)
    for choice in place.alone():
        alone[choice] = replace(alone[choice], quality=0.6)
    assert ranked_combinations(place, alone, budget) == [], "the sum of two is out"


@pytest.mark.parametrize(("budget", "own", "other"), [(BUDGETS[0], 0.7, 0.75), (BUDGETS[1], 31.5, 31.2)], ids=str)
def test_combinations_beside_another_bundle_count_its_own_harm_and_time_once(
    budget: Budget, own: float, other: float
) -> None:
    """A smaller bundle takes half of the reference's time and does most of the harm before any shortcut."""
    place = space()
    ways = {choice: place.way(choice) for choice in place.alone()}
    alone = {choice: measured(way, other, 0.5 * made_up_ratio(way)) for choice, way in ways.items()}
    alone[place.reference] = measured(REFERENCE, own, 0.5)
    two = replace(place.reference, course=Course("ddim", 10), guided=0.75)
    three = replace(place.reference, course=Course("ddim", 15), guidance_scale=2.0, guided=0.75)
    ranked = ranked_combinations(place, alone, budget)
    assert {two, three} <= set(ranked), "what both add to the bundle's own harm is within"
    assert ranked.index(two) < ranked.index(three), "each part is fast for the bundle's sake, which counts once"


def test_each_way_of_combinations_is_measured_once() -> None:
    measure = MadeUp(BUDGETS[0], 50.0)
    search(space(), measure, BUDGETS[0], PICTURES)
    assert len(measure.asked) == len(set(measure.asked))
    assert AT_A_TIME > 1


def test_choices_as_ways() -> None:
    place = space()
    choice = Choice(Course("ddim", 10), 3.0, 0.5, Caching(3))
    assert place.way(choice) == Way("ddim", 10, 3.0, guidance_steps=(0, 5), deepcache=3)
    measured_schedule = replace(choice, caching=Caching(3, measured=True))
    assert place.way(measured_schedule).deepcache == (0, 1, 2, 3)
    single = replace(choice, course=Course("ddim", 4), caching=Caching(5, measured=True))
    assert place.way(single) == Way("ddim", 4, 3.0, guidance_steps=(0, 2), deepcache=5), "one whole step either way"
    few = replace(choice, course=Course("lcm", 4, 1.0), guided=1.0, caching=Caching(1))
    assert place.way(few) == Way("lcm", 4, 1.0)
    assert place.way(place.reference) == REFERENCE


def test_a_space_has_what_the_bundle_can_do_and_no_value_that_does_nothing() -> None:
    assert any(course.sampler == "lcm" for course in space().courses)
    plain = space(Abilities(lcm=False, deepcache=False, intervals=False))
    assert plain.guidance_scales == (3.0,)
    assert {choice.guided for choice in plain.all()} == {1.0}
    assert {choice.caching for choice in plain.all()} == {Caching(1)}
    unguided = space(reference=Way("ddim", 20, 1.0))
    assert unguided.guided == (1.0,)
    assert unguided.guidance_scales == (1.0,)
    of_lcm = [choice for choice in space().all() if choice.course.sampler == "lcm"]
    assert {(choice.guidance_scale, choice.guided) for choice in of_lcm} == {(3.0, 1.0)}
    assert min(course.steps for course in space(reference=Way("ddim", 1, 3.0)).courses) == 1


@pytest.mark.parametrize("text", ["fd=+1.0", "fd=1"])
def test_budgets_as_they_are_written(text: str) -> None:
    assert parse_budget(text) == Budget(Measure.FRECHET, 1.0)
    assert str(parse_budget(text)) == "fd=+1"
    assert parse_budget("psnr=30dB") == parse_budget("psnr=30") == Budget(Measure.PSNR, 30.0)
    assert str(parse_budget("psnr=30")) == "psnr=30"
    assert parse_budget("fd=+0").allows(-0.5)
    assert not parse_budget("fd=+0").allows(0.01)
    assert parse_budget("psnr=30").allows(30.0)
    assert not parse_budget("psnr=30").allows(29.9)


@pytest.mark.parametrize(
    "text", ["", "1.0", "ssim=0.9", "fd", "fd=", "fd=much", "fd=-1", "fd=nan", "psnr=100", "psnr=inf"]
)
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match=r"--budget '.*': expected .*; for example --budget fd="):
        parse_budget(text)


def test_measurements_are_kept_and_half_a_line_is_not(tmp_path: Path) -> None:
    way = Way("ddim", 12, 2.5, guidance_steps=(0, 9), deepcache=(0, 3, 7))
    measure = MadeUp(BUDGETS[0])
    kept = KeptMeasurements(tmp_path, BUNDLE, measure)
    first = kept(way, 7)
    assert kept(way, 7) == first
    kept(way, 9)
    assert measure.asked == [(way, 7), (way, 9)]
    with (tmp_path / NAME).open("a") as file:
        file.write('{"way": {"sampler"')
    moved = Path("moved")
    again = KeptMeasurements(tmp_path, moved, measure)
    assert again(way, 7) == replace(first, bundle=moved)
    again(way, 11)
    assert measure.asked == [(way, 7), (way, 9), (way, 11)]
    assert [each.pictures for each in read_measurements(tmp_path / NAME, BUNDLE)] == [7, 9, 11]
