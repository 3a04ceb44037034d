"""Widths by measured error: the curves, the choice against a search through all choices, and what cannot be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from small_unets import make_state
from test_importance import probe

from sdc.compiler.compress.budgets import (
    Step,
    allocate,
    allowed_units,
    measure_curves,
    steps_of_curves,
    uniform_steps,
)
from sdc.compiler.compress.channels import ChannelGroup, Member, find_groups
from sdc.compiler.compress.importance import magnitudes
from sdc.compiler.compress.prune import prune
from sdc.engines.errors import InputError


def group(name: str, units: int, parameters: int) -> ChannelGroup:
    member = Member(name, "in", np.arange(units)[:, None], parameters)
    return ChannelGroup(name, "feed-forward", units, 1, (member,))


GROUPS = [group("a", 8, 10), group("b", 8, 30), group("c", 4, 100)]


def test_the_choice_is_the_best_of_all_with_convex_errors() -> None:
    """At the savings that the greedy choice comes to, no other choice saves as much at less error."""
    curves = {
        "a": {units: 0.3 * (8 - units) ** 2 for units in range(2, 9)},
        "b": {units: 1.0 * (8 - units) ** 2 for units in range(2, 9)},
        "c": {units: 7.0 * (4 - units) ** 2 for units in range(1, 5)},
    }
    steps = steps_of_curves(GROUPS, curves, multiple=1)
    for goal in (15, 120, 250, 400):
        kept = allocate(steps, goal)
        chosen = {each.name: kept.get(each.name, each.units) for each in GROUPS}
        saved, error = outcome(chosen, curves)
        assert saved >= goal
        levels = [allowed_units(each, 1) for each in GROUPS]
        others = [outcome(dict(zip("abc", choice, strict=True)), curves) for choice in itertools.product(*levels)]
        assert error == pytest.approx(min(its_error for its_saved, its_error in others if its_saved >= saved))


def outcome(kept: dict[str, int], curves: dict[str, dict[int, float]]) -> tuple[int, float]:
    """Parameters saved, and the sum of the errors."""
    saved = sum((each.units - kept[each.name]) * each.unit_parameters for each in GROUPS)
    return saved, sum(curves[name][units] for name, units in kept.items())


def test_a_concave_stretch_is_passed_in_one_go() -> None:
    """Half a group costs as much as all that may go: a step after it is never dearer than the one before."""
    (only,) = groups = [group("a", 8, 1)]
    steps = steps_of_curves(groups, {"a": {8: 0.0, 6: 5.0, 4: 6.0, 2: 7.0}}, multiple=1)
    assert [step.units for step in steps] == [7, 6, 5, 4, 3, 2]
    assert [step.price for step in steps] == pytest.approx([7 / 6] * 6)
    assert allowed_units(only, 1)[-1] == 2


def test_steps_of_many_groups_are_taken_in_order() -> None:
    """A group goes down unit by unit: at most one step more is saved than was asked for."""
    random = np.random.default_rng(3)
    for _ in range(50):
        groups = [group(str(number), int(random.integers(8, 60)), int(random.integers(1, 999))) for number in range(30)]
        curves = {}
        for each in groups:
            levels = [each.units * share // 4 for share in (4, 3, 2, 1)]
            errors = random.uniform(0, 0.01, len(levels)).cumsum() - 0.01 * random.random()
            curves[each.name] = {levels[0]: 0.0, **dict(zip(levels[1:], errors[1:].tolist(), strict=True))}
        steps = steps_of_curves(groups, curves, multiple=1)
        for each in groups:
            prices = [step.price for step in steps if step.group == each.name]
            assert prices == sorted(prices)
        goal = int(sum(step.saved for step in steps) * random.uniform(0.1, 0.9))
        kept = allocate(steps, goal)
        saved = sum((each.units - kept.get(each.name, each.units)) * each.unit_parameters for each in groups)
        assert goal <= saved < goal + max(step.saved for step in steps)


def test_uniform_steps_take_the_same_share() -> None:
    kept = allocate(uniform_steps(GROUPS, multiple=1), 360)
    assert kept == {"a": 4, "b": 4, "c": 2}


def test_more_than_can_go_is_refused() -> None:
    steps = uniform_steps(GROUPS, multiple=1)
    assert allocate(steps, sum(step.saved for step in steps)) == {"a": 2, "b": 2, "c": 1}
    with pytest.raises(InputError, match=r"541 parameters shall go, but at most 540 can; .*--parameters"):
        allocate(steps, 541)


def test_nothing_to_save_takes_nothing() -> None:
    assert allocate([Step("a", 3, 10, 0.0)], 0) == {}


def test_curves_are_the_error_of_the_pruned_network() -> None:
    state = make_state()
    groups = find_groups(state.build_empty())
    unet, made = state.build(), probe(5)
    scores = magnitudes(unet, groups)
    told: list[str] = []
    curves = measure_curves(unet, groups, scores, made, multiple=8, rows=2, tell=told.append)
    assert told[0] == f"sensitivity: 0 of {len(groups)} groups"
    whole = unet(made.sample, made.timesteps, made.states).sample
    for each in (groups[0], groups[3], groups[-1]):
        levels = allowed_units(each, 8)
        assert set(curves[each.name]) <= set(levels)
        assert curves[each.name][each.units] == 0
        smallest = min(curves[each.name])
        assert smallest == levels[-1]
        kept = {each.name: np.sort(np.argsort(-scores[each.name], kind="stable")[:smallest])}
        pruned = prune(state, [each], kept).build()(made.sample, made.timesteps, made.states).sample
        expected = float((pruned - whole).square().sum() / whole.square().sum())
        assert curves[each.name][smallest] == pytest.approx(expected, rel=1e-3)
