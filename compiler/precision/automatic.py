"""A precision for each layer, by measurement: fast where the picture does not see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sdc.compiler.precision.sensitivity import Sensitivity
from sdc.engines.errors import InputError
from sdc.passes.precision.formats import FLOATING, Format
from sdc.passes.precision.plan import PlannedLayer, PrecisionPlan

RATES = {
    "cpu": {Format.FP32: 1.0, Format.FP16: 6.0, Format.BF16: 6.0, Format.INT8: 12.0},
    "gpu": {Format.FP32: 1.0, Format.FP16: 4.0, Format.BF16: 4.0, Format.INT8: 8.0, Format.FP8: 8.0},
}
"""Multiply-adds a second relative to float32.

Source: cpu, matrix products on two cores with AMX: 0.43, 2.6 and 4.6 to 5.7 TFLOP/s in fp32, bf16 and int8. fp16
stands for bf16. gpu: assumed, neither measured nor taken from a document; replace them with measured rates.
"""


@dataclass(frozen=True)
class AutomaticPlan:
    """What was chosen.

    Attributes:
        plan: the precision of every layer, with reasons.
        predicted_error: relative mean square of epsilon, if errors of layers add up.
        psnr_db: measured, pictures of the plan against float32's.
        modelled_time: of the layers, as a part of what they take in the default precision.
    """

    plan: PrecisionPlan
    predicted_error: float
    psnr_db: float
    modelled_time: float


def choose_plan(
    wanted: PrecisionPlan,
    sensitivity: Sensitivity,
    measure_psnr: Callable[[PrecisionPlan], float],
    *,
    budget_db: float,
    rates: Mapping[Format, float],
) -> AutomaticPlan:
    """The plan with the fewest layers left in floating point whose pictures keep to the budget.

    Layers are ranked by error per time saved, and the worst ones stay in `wanted.default`; how many is found by
    bisection, each step with a measurement, since errors of layers need not add up in a picture.

    Args:
        wanted: the fast format of every layer.
        sensitivity: of these formats.
        measure_psnr: of the pictures of a plan, in dB.
        budget_db: the least PSNR.
        rates: multiply-adds a second by format; see `RATES`.

    Raises:
        InputError: not one layer can be quantised within the budget.
    """
    ranked = _ranked(wanted, sensitivity, rates)
    if not ranked:
        raise InputError("no layer would be faster in another precision", hint="choose a single precision")

    def plan_with(kept: int) -> PrecisionPlan:
        return _plan_from_ranking(wanted, ranked[:kept], sensitivity, budget_db)

    measured: dict[int, float] = {}

    def fits(kept: int) -> bool:
        if kept not in measured:
            measured[kept] = measure_psnr(plan_with(kept))
        return measured[kept] >= budget_db

    low, high = 0, len(ranked) - 1
    if not fits(high):
        raise InputError(
            f"no layer can be quantised within {budget_db:g} dB: the most harmless alone gives {measured[high]:.1f} dB",
            hint="lower --quality-budget, or choose a floating-point precision",
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    fits(high)
    plan = plan_with(high)
    quantised = [layer for layer in plan.layers if layer.format not in FLOATING]
    return AutomaticPlan(
        plan=plan,
        predicted_error=sum(sensitivity.layers[layer.name] for layer in quantised),
        psnr_db=measured[high],
        modelled_time=_time(plan, rates) / _time(wanted.in_default(), rates),
    )


def _ranked(wanted: PrecisionPlan, sensitivity: Sensitivity, rates: Mapping[Format, float]) -> list[str]:
    """Layers that would be faster, the most harmful for what they save first."""
    saved = {
        layer.name: layer.macs * (1 / rates[wanted.default] - 1 / rates.get(layer.format, rates[wanted.default]))
        for layer in wanted.layers
    }
    faster = [name for name, gain in saved.items() if gain > 0]
    return sorted(faster, key=lambda name: sensitivity.layers[name] / saved[name], reverse=True)


def _plan_from_ranking(
    wanted: PrecisionPlan, kept: list[str], sensitivity: Sensitivity, budget_db: float
) -> PrecisionPlan:
    places = {name: place for place, name in enumerate(kept, start=1)}

    def decided(layer: PlannedLayer) -> PlannedLayer:
        error = f"alone it changes epsilon by {sensitivity.layers[layer.name] ** 0.5:.1e}"
        if layer.name not in places:
            return replace(layer, reason=error)
        reason = f"{error}: number {places[layer.name]} by error for time saved, kept for {budget_db:g} dB"
        return replace(layer, format=wanted.default, reason=reason)

    return replace(wanted, layers=tuple(map(decided, wanted.layers)))


def _time(plan: PrecisionPlan, rates: Mapping[Format, float]) -> float:
    return sum(layer.macs / rates.get(layer.format, rates[plan.default]) for layer in plan.layers)
