"""A precision for each layer, by measurement: fast where the picture does not see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sdc.compiler.precision.budget import QualityBudget
from sdc.compiler.precision.layer_costs import LayerCosts
from sdc.compiler.precision.sensitivity import Sensitivity
from sdc.passes.precision.formats import FLOATING, WEIGHTS_ONLY
from sdc.passes.precision.plan import PlannedLayer, PrecisionPlan

_LEAST_GAIN = 0.02
"""Part of a layer's time that has to be saved: less is noise."""

_SAME_TIME = 0.03
"""Part of a step's time by which two steps may differ and still count as equally fast."""


@dataclass(frozen=True)
class AutomaticPlan:
    """What was chosen.

    Attributes:
        plan: the precision of every layer, with reasons.
        predicted_error: relative mean square of epsilon, if errors of layers add up.
        quality: measured, pictures of the plan against float32's, in the budget's measure.
        time: of the layers, as a part of what they take in the default precision.
    """

    plan: PrecisionPlan
    predicted_error: float
    quality: float
    time: float


def choose_plan(
    wanted: PrecisionPlan,
    sensitivity: Sensitivity,
    measure: Callable[[PrecisionPlan], float],
    *,
    budget: QualityBudget,
    costs: LayerCosts,
) -> AutomaticPlan | None:
    """The plan with the fewest layers left in floating point whose pictures keep to the budget.

    Layers are ranked by error per time saved, and the worst ones stay in `wanted.default`; how many is found by
    bisection, each step with a measurement, since errors of layers need not add up in a picture.

    Args:
        wanted: the fast format of every layer; those with short weights alone keep it in any case.
        sensitivity: of these formats.
        measure: the pictures of a plan, in the budget's measure.
        budget: what pictures have to keep to.
        costs: of the layers, in these formats and in `wanted.default`.

    Returns:
        The plan; None if no layer by itself would be faster, or if not even the most harmless one keeps to the budget.
    """
    ranked = _ranked(wanted, sensitivity, costs)
    if not ranked:
        return None

    def plan_with(kept: int) -> PrecisionPlan:
        return _plan_from_ranking(wanted, ranked, kept, sensitivity, costs, budget)

    measured: dict[int, float] = {}

    def fits(kept: int) -> bool:
        if kept not in measured:
            measured[kept] = measure(plan_with(kept))
        return budget.allows(measured[kept])

    low, high = 0, len(ranked) - 1
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    fits(high)
    return _measured(plan_with(high), sensitivity, costs, measured[high])


def planned_before(plan: PrecisionPlan, sensitivity: Sensitivity, costs: LayerCosts, quality: float) -> AutomaticPlan:
    """A plan that was not searched for, as a candidate beside the one that was.

    Args:
        plan: of the layers that `sensitivity` and `costs` know.
        sensitivity: of the quantised formats.
        costs: of the layers.
        quality: measured.
    """

    def told(layer: PlannedLayer) -> PlannedLayer:
        if layer.format in FLOATING | WEIGHTS_ONLY:
            return layer
        return replace(layer, reason=_reason(layer, sensitivity, costs))

    told_plan = replace(plan, layers=tuple(map(told, plan.layers)))
    return _measured(told_plan, sensitivity, costs, quality)


def fastest(candidates: Sequence[AutomaticPlan], seconds: Sequence[float], budget: QualityBudget) -> AutomaticPlan:
    """The one that took least; of several that take as long as that, but for noise, the one with the best pictures."""
    limit = (1 + _SAME_TIME) * min(seconds)
    fast = [each for each, taken in zip(candidates, seconds, strict=True) if taken <= limit]
    return max(fast, key=lambda each: budget.merit(each.quality))


def _measured(plan: PrecisionPlan, sensitivity: Sensitivity, costs: LayerCosts, quality: float) -> AutomaticPlan:
    quantised = [layer for layer in plan.layers if layer.format not in FLOATING | WEIGHTS_ONLY]
    error = sum(sensitivity.layers[layer.name] for layer in quantised)
    return AutomaticPlan(plan, error, quality, costs.share(plan))


def _ranked(wanted: PrecisionPlan, sensitivity: Sensitivity, costs: LayerCosts) -> list[str]:
    """Layers that would be faster, the most harmful for what they save first."""
    saved = {
        layer.name: costs.layers[layer.name].saved
        for layer in wanted.layers
        if layer.format not in WEIGHTS_ONLY
        and costs.layers[layer.name].saved > _LEAST_GAIN * costs.layers[layer.name].floating
    }
    return sorted(saved, key=lambda name: sensitivity.layers[name] / saved[name], reverse=True)


def _plan_from_ranking(
    wanted: PrecisionPlan,
    ranked: list[str],
    kept: int,
    sensitivity: Sensitivity,
    costs: LayerCosts,
    budget: QualityBudget,
) -> PrecisionPlan:
    places = {name: place for place, name in enumerate(ranked, start=1)}

    def decided(layer: PlannedLayer) -> PlannedLayer:
        reason = _reason(layer, sensitivity, costs)
        place = places.get(layer.name)
        if place is None and layer.format in WEIGHTS_ONLY:
            return layer
        if place is None:
            return replace(layer, format=wanted.default, reason=f"not faster in {layer.format}: {reason}")
        if place > kept:
            return replace(layer, reason=reason)
        reason = f"{reason}: number {place} by error for time saved, kept for {budget.text(budget.limit)}"
        return replace(layer, format=wanted.default, reason=reason)

    return replace(wanted, layers=tuple(map(decided, wanted.layers)))


def _reason(layer: PlannedLayer, sensitivity: Sensitivity, costs: LayerCosts) -> str:
    error = sensitivity.layers[layer.name] ** 0.5
    return f"{costs.describe(costs.layers[layer.name])}; alone it changes epsilon by {error:.1e}"
