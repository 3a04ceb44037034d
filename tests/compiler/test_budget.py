"""How far automatic precisions may go."""

from __future__ import annotations

import numpy as np
import pytest

from sdc.compiler.precision.budget import Measure, QualityBudget, parse_budget
from sdc.engines.errors import InputError


@pytest.mark.parametrize(
    ("text", "measure", "limit"),
    [
        ("40dB", Measure.PSNR, 40.0),
        ("40", Measure.PSNR, 40.0),
        ("psnr=42.5db", Measure.PSNR, 42.5),
        ("fd=0.01", Measure.FRECHET, 0.01),
    ],
)
def test_budgets_are_read(text: str, measure: Measure, limit: float):
    assert parse_budget(text) == QualityBudget(measure, limit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("much", "no number of decibels"),
        ("fd=40dB", "no number of a Fréchet distance"),
        ("ssim=0.9", "'ssim' is no measure"),
        ("0dB", "more than 0 and less than 100, found 0"),
        ("100", "found 100; pictures look the same from 40 dB on"),
        ("nan", "found nan"),
        ("fd=-1", "more than 0 and less than 100, found -1; for example"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, message: str):
    with pytest.raises(InputError, match=message):
        parse_budget(text)


def test_more_decibels_and_less_distance_are_better():
    assert [parse_budget("40dB").allows(each) for each in (39.9, 40.0, 60.0)] == [False, True, True]
    assert not parse_budget("0.1dB").allows(parse_budget("0.1dB").worst)
    assert not parse_budget("fd=99").allows(parse_budget("fd=99").worst)
    assert [parse_budget("fd=0.01").allows(each) for each in (0.02, 0.01, 0.0)] == [False, True, True]


def test_psnr_is_the_mean_over_pictures_of_clipped_values():
    exact = [np.zeros((1, 3, 4, 4)), np.full((1, 3, 4, 4), 1.5)]
    found = [np.full((1, 3, 4, 4), 0.2), np.full((1, 3, 4, 4), 1.0)]
    # Of a span of 2, 0.2 is 20 dB; what lies beyond the span is equal, and counts as 100 dB.
    assert parse_budget("40dB").compare(found, exact) == pytest.approx((20 + 100) / 2)


def test_distance_is_the_judges():
    random = np.random.default_rng(0)
    exact = [random.uniform(-1, 1, (1, 3, 32, 32)) for _ in range(16)]
    budget = parse_budget("fd=1")
    slightly = [each + random.normal(0, 0.01, each.shape) for each in exact]
    plainly = [each + random.normal(0, 0.3, each.shape) for each in exact]
    assert budget.compare(exact, exact) == pytest.approx(0, abs=1e-6)
    assert 0 < budget.compare(slightly, exact) < budget.compare(plainly, exact)


def test_distance_is_for_the_model_that_the_judge_knows():
    parse_budget("fd=1").check_model("tiny")
    parse_budget("40dB").check_model("sd15")
    with pytest.raises(InputError, match="which there is for 'tiny', not for 'sd15'"):
        parse_budget("fd=1").check_model("sd15")
