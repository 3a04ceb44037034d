"""How many units each group keeps, so that a number of parameters goes at the least error.

The error of a group at some width is measured with its gates closed. Errors of different groups are taken to add up,
so that the best choice is found by going down the steepest: each group's error by parameters saved is made convex, and
the cheapest steps are taken until enough is saved.

Source: Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Transactions on
Acoustics, Speech, and Signal Processing 36 (1988), section III.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from sdc.compiler.compress.channels import ChannelGroup
from sdc.compiler.compress.gates import closed_gates
from sdc.compiler.compress.importance import Scores, best_units
from sdc.compiler.compress.probes import Probe
from sdc.engines.errors import InputError

MEASURED_SHARES = (0.75, 0.5, 0.25)
"""Of a group's units: where its error is measured; none keeps less than the last."""


@dataclass(frozen=True)
class Step:
    """A group's way from one width to the next smaller one.

    Attributes:
        group: its name.
        units: that are kept after it.
        saved: parameters.
        price: steps are taken in the order of it; never falling within a group.
    """

    group: str
    units: int
    saved: int
    price: float


Curve = dict[int, float]
"""Units kept to the prediction's error: mean square of the change over that of the prediction; 0 with all of them."""


def allowed_units(group: ChannelGroup, multiple: int) -> list[int]:
    """Numbers of units that a group may keep, falling; none below the smallest measured share."""
    return [units for units in group.kept_units(multiple) if units >= MEASURED_SHARES[-1] * group.units]


@torch.no_grad()
def measure_curves(
    unet: UNet2DConditionModel,
    groups: Sequence[ChannelGroup],
    scores: Scores,
    probe: Probe,
    *,
    multiple: int,
    rows: int,
    tell: Callable[[str], None],
) -> dict[str, Curve]:
    """Every group's error at a few widths, the others being whole.

    Args:
        unet: on the probe's device.
        groups: of this UNet.
        scores: say which units a width keeps.
        probe: inputs over all timesteps.
        multiple: of channels.
        rows: at a time.
        tell: receives lines of progress.
    """
    whole = [unet(part.sample, part.timesteps, part.states).sample for part in probe.split(rows)]
    scale = sum(float(each.square().sum()) for each in whole)
    curves: dict[str, Curve] = {}
    for number, group in enumerate(groups):
        if number % 10 == 0:
            tell(f"sensitivity: {number} of {len(groups)} groups")
        levels = allowed_units(group, multiple)
        curve = {levels[0]: 0.0}
        for units in _measured(levels):
            kept = {group.name: best_units(scores[group.name], units)}
            with closed_gates(unet, [group], kept):
                found = (unet(part.sample, part.timesteps, part.states).sample for part in probe.split(rows))
                change = sum(float((a - b).square().sum()) for a, b in zip(found, whole, strict=True))
            curve[units] = change / scale
        curves[group.name] = curve
    return curves


def _measured(levels: Sequence[int]) -> list[int]:
    """The allowed numbers nearest to the measured shares, falling, without the whole; the last is the smallest."""
    nearest = {min(levels, key=lambda level: abs(level - share * levels[0])) for share in MEASURED_SHARES}
    return sorted((nearest | {levels[-1]}) - {levels[0]}, reverse=True)


def steps_of_curves(groups: Sequence[ChannelGroup], curves: Mapping[str, Curve], *, multiple: int) -> list[Step]:
    """The steps of all groups, priced at error per parameter on the convex hull of each curve."""
    steps = []
    for group in groups:
        levels = allowed_units(group, multiple)
        hull = _convex(curves[group.name])
        slopes = [_slope(*ends) for ends in pairwise(hull)]  # rising; the steps of one segment have one price, exactly
        segments = np.searchsorted([gone for gone, _ in hull[1:]], [levels[0] - units for units in levels[1:]])
        for (before, units), segment in zip(pairwise(levels), segments, strict=True):
            saved = (before - units) * group.unit_parameters
            steps.append(Step(group.name, units, saved, slopes[segment] / group.unit_parameters))
    return steps


def _convex(curve: Curve) -> list[tuple[int, float]]:
    """Corners of the largest convex curve below the measured one: units that are gone, and the error."""
    whole = max(curve)
    hull: list[tuple[int, float]] = []
    for x, y in sorted((whole - units, error) for units, error in curve.items()):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _slope(begin: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - begin[1]) / (end[0] - begin[0])


def uniform_steps(groups: Sequence[ChannelGroup], *, multiple: int) -> list[Step]:
    """The steps that take the same share of every group."""
    steps = []
    for group in groups:
        levels = allowed_units(group, multiple)
        for before, units in pairwise(levels):
            saved = (before - units) * group.unit_parameters
            steps.append(Step(group.name, units, saved, 1 - units / group.units))
    return steps


def allocate(steps: Sequence[Step], parameters: int) -> dict[str, int]:
    """Units kept by each group that loses any, after the cheapest steps that save `parameters`.

    Args:
        steps: those of a group in order.
        parameters: to save; one step more is saved at most.

    Raises:
        InputError: all steps together save less.
    """
    possible = sum(step.saved for step in steps)
    if possible < parameters:
        raise InputError(
            f"{parameters:,} parameters shall go, but at most {possible:,} can", hint="ask for less with --parameters"
        )
    kept: dict[str, int] = {}
    saved = 0
    for step in sorted(steps, key=lambda step: step.price):  # stable: a group's steps stay in order
        if saved >= parameters:
            break
        kept[step.group] = step.units
        saved += step.saved
    return kept
