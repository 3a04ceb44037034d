"""The stage `plan` of an export: a precision for each layer of the UNet, by measurement."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdc.compiler.calibration.table_file import read_table
from sdc.compiler.component import Component
from sdc.compiler.half_stage import HalfCheck, draw_settings, islands_of, open_tokenizer
from sdc.compiler.precision.automatic import AutomaticPlan, choose_plan, fastest, planned_before
from sdc.compiler.precision.budget import QualityBudget
from sdc.compiler.precision.capabilities import in_float32, runs_here
from sdc.compiler.precision.layer_costs import LayerCosts, modelled_costs
from sdc.compiler.precision.layer_times import measure_costs
from sdc.compiler.precision.sensitivity import measure_sensitivity
from sdc.compiler.precision.step_times import time_steps
from sdc.compiler.precision.studio import PrecisionPhase, Scene, Studio
from sdc.compiler.stages import PLAN_NAME, fused_component, planned_passes
from sdc.engines.errors import InputError, NumericalError
from sdc.engines.networks import DenoisingStep
from sdc.engines.processor import multiplies_bytes_exactly
from sdc.engines.schedule_config import schedule_from_config
from sdc.engines.targets import Target, parse_targets
from sdc.passes.base import Pass, run_passes
from sdc.passes.pipeline import MIXED, precision_passes
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.formats import Format
from sdc.passes.precision.layer_roles import Role
from sdc.passes.precision.plan import PrecisionPlan, uniform_plan
from sdc.passes.precision.plan_file import text_from_plan
from sdc.passes.precision.quantisation import DEFAULT_WEIGHTS_ONLY
from sdc.passes.precision.range_rules import RangeRule
from sdc.passes.precision.smooth_quant import SmoothQuant

_STEPS = 8
_SEED = 1000
"""Of the first picture: other noise than calibration's."""
_USUAL_STEPS = 20
"""Of a picture: how often the UNet runs for once that what depends on the prompt alone does."""
_SAMPLED_STEPS = (0, 3, 7)
"""Steps of the first picture whose inputs are samples: noise, half-way, and nearly done."""
_EXACT, _IN_FLOAT32 = parse_targets("ort-cpu,cpu")
"""Where pictures in float32 are drawn, and a target that does not run here is simulated: on the second where this
processor's products of bytes saturate."""


@dataclass(frozen=True)
class Automatic:
    """Input of the stage.

    Attributes:
        drawing: the exported model and what surrounds it.
        table: file of the calibration.
        overflows: result of the stage `check-fp16`.
        budget: what pictures have to keep to, against those in float32.
        defaults: of what stays in floating point: the first one in which the pictures keep to the budget is taken.
        targets: that the plan is for; if all run here, they draw and are timed, else that is simulated and modelled.
        rule: how ranges follow from the calibration where a layer is tried by itself, or a target is simulated.
        rules: likewise in the engines, by name of the target.
        correct_bias: whether biases make up for rounded weights.
        hoist: whether the UNet's engine is one of several.
    """

    drawing: HalfCheck
    table: Path
    overflows: Path
    budget: QualityBudget
    defaults: tuple[Format, ...]
    targets: tuple[Target, ...]
    rule: RangeRule
    rules: Mapping[str, RangeRule]
    correct_bias: bool
    hoist: bool


def automatic_stage(inputs: Automatic, folder: Path, report: Callable[[int, int], None]) -> Any:
    """Measure every layer by itself, then pictures of ever fewer plans, and write the plan that is chosen.

    Where the targets run here, the plan that "int8" stands for and plain floating point are in the choice as well, if
    they keep to the budget, and the UNet's own time decides: times of layers do not quite add up.

    Raises:
        InputError: the budget allows not even floating point; or, where nothing can be timed, no layer in int8.
    """
    drawing, budget = inputs.drawing, inputs.budget
    components = {
        name: fused_component(spec, drawing.folders[name], drawing.fuse)[0]
        for name, spec in drawing.specs.items()
        if name != "vae_encoder"
    }
    unet = components["unet"]
    table = read_table(inputs.table)
    measured = all(map(runs_here, inputs.targets))
    phase = _precision_phase(inputs, inputs.rules if measured else {})
    scene = _scene(drawing, budget)
    open_studio = partial(Studio, components=components, phase=phase, scene=scene)
    samples: list[Mapping[str, np.ndarray]] = []

    def keep(step: DenoisingStep) -> None:
        if step.index in _SAMPLED_STEPS:
            samples.append({name: np.array(value) for name, value in step.feeds.items()})

    with open_studio(_EXACT) as studio:
        exact = studio.draw(uniform_plan(unet.model, Format.FP32), on_step=keep)
    with ExitStack() as stack:
        studios = [stack.enter_context(open_studio(each)) for each in (inputs.targets if measured else (_simulator(),))]

        def measure(plan: PrecisionPlan) -> float:
            run = plan if measured else plan.with_default(Format.FP32)
            try:
                return min((budget.compare(studio.draw(run), exact) for studio in studios), key=budget.merit)
            except NumericalError:
                return budget.worst

        qualities: dict[str, float] = {}
        floating = _floating_format(unet, inputs, measure, qualities) if measured else inputs.defaults[0]
        plan_of = partial(uniform_plan, unet.model, Format.INT8, default=floating, sizes=_sizes(unet))
        wanted = plan_of(kept=DEFAULT_WEIGHTS_ONLY)
        costs = _costs(unet, wanted, inputs, table if measured else None, report)
        sensitivity = measure_sensitivity(
            _calibrated(unet, table), table, wanted, samples, rule=inputs.rule, on_run=report
        )
        found = choose_plan(wanted, sensitivity, measure, budget=budget, costs=costs)
        candidates = {} if found is None else {MIXED: found}
        if measured:
            usual = {
                Format.INT8.value: plan_of(),
                floating.value: _plain(unet, floating, budget),
            }
            for name, plan in usual.items():
                if name not in qualities:
                    qualities[name] = measure(plan)
                if budget.allows(qualities[name]):
                    candidates[name] = planned_before(plan, sensitivity, costs, qualities[name])
    if not candidates:
        raise InputError(
            f"no layer of the UNet is faster in int8 than in {floating} and keeps to {budget.text(budget.limit)}",
            hint="loosen --quality-budget, or choose a floating-point precision",
        )
    seconds = _step_seconds(unet, candidates, inputs, phase) if measured else {}
    best, *others = candidates.values()
    if others:
        best = fastest([best, *others], [sum(each.values()) for each in seconds.values()], budget)
    (folder / PLAN_NAME).write_text(text_from_plan(best.plan), encoding="utf-8")
    qualities |= {name: each.quality for name, each in candidates.items()}
    return {
        "measure": budget.measure.value,
        "limit": budget.limit,
        "quality": _rounded(best.quality),
        "drawn": {
            "pictures": len(scene.drawn.prompts),
            "steps": scene.drawn.steps,
            "guidance_scale": scene.drawn.guidance_scale,
        },
        "floating": floating.value,
        "chosen": next(name for name, each in candidates.items() if each is best),
        "candidates": {
            name: {"quality": _rounded(quality), "step_seconds": seconds.get(name)}
            for name, quality in qualities.items()
        },
        "predicted_epsilon_error": _rounded(best.predicted_error),
        "layer_time": round(best.time, 3),
        "layers": {each.value: sum(line.format is each for line in best.plan.layers) for each in Format},
    }


def _simulator() -> Target:
    """The target whose engines stand for those that do not run here."""
    return _EXACT if multiplies_bytes_exactly() else _IN_FLOAT32


def _rounded(value: float) -> float | None:
    """For JSON, which has no infinities."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _plain(unet: Component, floating: Format, budget: QualityBudget) -> PrecisionPlan:
    """Nothing quantised."""
    plan = uniform_plan(unet.model, floating, sizes=_sizes(unet))
    reason = f"no faster plan keeps to {budget.text(budget.limit)}"
    return replace(plan, layers=tuple(replace(layer, reason=reason) for layer in plan.layers))


def _precision_phase(inputs: Automatic, rules: Mapping[str, RangeRule]) -> PrecisionPhase:
    """As the bundle's engines have it on targets that have a rule of their own."""
    islands = islands_of(inputs.overflows)

    def phase(name: str, plan: PrecisionPlan, target: Target) -> tuple[Pass, ...]:
        float32 = islands.get(name, frozenset())
        if name != "unet":
            return precision_passes(plan.default, float32=float32, backend=target.backend, component=name)
        return planned_passes(
            plan,
            inputs.table,
            rules.get(target.name, inputs.rule),
            correct_bias=inputs.correct_bias,
            in_float32=in_float32(target),
            islands=float32,
            backend=target.backend,
        )

    return phase


def _scene(drawing: HalfCheck, budget: QualityBudget) -> Scene:
    settings, drawn = draw_settings(drawing, pictures=budget.pictures, steps=_STEPS, seed=_SEED)
    schedule = schedule_from_config(json.loads(drawing.files["scheduler/scheduler_config.json"]))
    return Scene(open_tokenizer(drawing.files, drawing.configs), schedule, settings, drawn)


def _floating_format(
    unet: Component,
    inputs: Automatic,
    measure: Callable[[PrecisionPlan], float],
    qualities: dict[str, float],
) -> Format:
    """The first floating-point precision whose pictures keep to the budget; `qualities` gets what is measured."""
    budget = inputs.budget
    for default in inputs.defaults:
        qualities[default.value] = measure(uniform_plan(unet.model, default))
        if budget.allows(qualities[default.value]):
            return default
    found = ", ".join(f"{budget.text(quality)} in {name}" for name, quality in qualities.items())
    raise InputError(
        f"floating point alone does not keep to {budget.text(budget.limit)}: pictures keep {found}",
        hint="loosen --quality-budget",
    )


def _costs(
    unet: Component,
    wanted: PrecisionPlan,
    inputs: Automatic,
    measured_with: CalibrationTable | None,
    report: Callable[[int, int], None],
) -> LayerCosts:
    if measured_with is None:
        costs = modelled_costs(wanted)
    else:
        known = bool(measured_with.results)
        rules = {name: replace(rule, results=rule.results and known) for name, rule in inputs.rules.items()}
        costs = measure_costs(unet, wanted, inputs.targets, rules=rules, on_layer=report)
    if not inputs.hoist:
        return costs
    prompt = {layer.name for layer in wanted.layers if layer.role is Role.PROMPT}
    return costs.scaled(prompt, 1 / _USUAL_STEPS)


def _step_seconds(
    unet: Component, candidates: Mapping[str, AutomaticPlan], inputs: Automatic, phase: PrecisionPhase
) -> dict[str, dict[str, float]]:
    """Seconds of a step by candidate and target."""
    plans = [each.plan for each in candidates.values()]
    found: dict[str, dict[str, float]] = {name: {} for name in candidates}
    for target in inputs.targets:
        passes = [phase("unet", plan, target) for plan in plans]
        seconds = time_steps(unet, passes, target, hoist=inputs.hoist)
        for name, taken in zip(candidates, seconds.tolist(), strict=True):
            found[name][target.name] = taken
    return found


def _sizes(unet: Component) -> dict[str, int]:
    return {symbol: size.optimum for symbol, size in unet.spec.dimensions.items()}


def _calibrated(unet: Component, table: CalibrationTable) -> Component:
    """The graph that the table belongs to."""
    model = unet.model.clone()
    run_passes(() if table.smoothing is None else (SmoothQuant(table.smoothing),), model)
    return Component(unet.spec, model)
