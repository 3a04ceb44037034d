"""The stage `plan` of an export: a precision for each layer of the UNet, by measurement."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdc.compiler.build.built import save_onnx
from sdc.compiler.calibration.table_file import read_table
from sdc.compiler.component import Component
from sdc.compiler.evaluate.metrics import psnr
from sdc.compiler.half_stage import HalfCheck, draw_settings, open_tokenizer
from sdc.compiler.precision.automatic import choose_plan, fastest, planned_before
from sdc.compiler.precision.capabilities import in_float32, runs_here
from sdc.compiler.precision.half_safety import HalfCheckSettings, picture_generation
from sdc.compiler.precision.layer_costs import modelled_costs
from sdc.compiler.precision.layer_times import measure_costs
from sdc.compiler.precision.planning import passes_from_plan
from sdc.compiler.precision.sensitivity import measure_sensitivity
from sdc.compiler.precision.step_times import time_steps
from sdc.compiler.stages import PLAN_NAME, fused_component, quantising_passes
from sdc.engines.errors import InputError
from sdc.engines.pipeline import Pipeline
from sdc.engines.schedule_config import schedule_from_config
from sdc.engines.session import Run, Session
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.targets import ONNXRUNTIME, Target
from sdc.passes.base import Pass, run_passes
from sdc.passes.pipeline import lowering_passes
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.formats import FLOATING, Format
from sdc.passes.precision.layer_roles import Role
from sdc.passes.precision.plan import PrecisionPlan, uniform_plan
from sdc.passes.precision.plan_file import text_from_plan
from sdc.passes.precision.quantisation import DEFAULT_WEIGHTS_ONLY
from sdc.passes.precision.range_rules import RangeRule
from sdc.passes.precision.smooth_quant import SmoothQuant

_PICTURES = 4
_STEPS = 8
_USUAL_STEPS = 20
"""Of a picture: how often the UNet runs for once that what depends on the prompt alone does."""
_EQUAL_DB = 120.0
"""What counts as the same picture."""
_SAMPLED_STEPS = (0, 3, 7)
"""Steps of the first picture whose inputs are samples: noise, half-way, and nearly done."""


@dataclass(frozen=True)
class Automatic:
    """Input of the stage.

    Attributes:
        drawing: the exported model and what surrounds it.
        table: file of the calibration.
        budget_db: least PSNR of pictures to those in float32.
        default: of what stays in floating point.
        targets: that the plan is for; times are measured if all of them run here, and modelled otherwise.
        rule: how ranges follow from the calibration.
        correct_bias: whether biases make up for rounded weights.
        hoist: whether the UNet's engine is one of several.
    """

    drawing: HalfCheck
    table: Path
    budget_db: float
    default: Format
    targets: tuple[Target, ...]
    rule: RangeRule
    correct_bias: bool
    hoist: bool


def automatic_stage(inputs: Automatic, folder: Path, report: Callable[[int, int], None]) -> Any:
    """Measure every layer by itself, then pictures of ever fewer plans, and write the plan that is chosen.

    Where the targets run here, the plan that "int8" stands for is in the choice as well, if it keeps to the budget, and
    the UNet's own time decides: times of layers do not quite add up.

    Raises:
        InputError: not one layer can be quantised within the budget, or none would be faster.
    """
    drawing = inputs.drawing
    components = {
        name: fused_component(spec, drawing.folders[name], drawing.fuse)[0]
        for name, spec in drawing.specs.items()
        if name != "vae_encoder"
    }
    unet = components["unet"]
    table = read_table(inputs.table)
    sizes = {symbol: size.optimum for symbol, size in unet.spec.dimensions.items()}
    plan_of = partial(uniform_plan, unet.model, Format.INT8, default=inputs.default, sizes=sizes)
    usual, wanted = plan_of(), plan_of(kept=DEFAULT_WEIGHTS_ONLY)
    measured = all(map(runs_here, inputs.targets))
    if measured:
        costs = measure_costs(unet, wanted, inputs.targets, symmetric=inputs.rule.symmetric, on_layer=report)
    else:
        costs = modelled_costs(wanted)
    if inputs.hoist:
        prompt = {layer.name for layer in wanted.layers if layer.role is Role.PROMPT}
        costs = costs.scaled(prompt, 1 / _USUAL_STEPS)
    with ExitStack() as stack:
        studio = _Studio(drawing, components, stack)
        samples, exact = studio.draw_exact()
        sensitivity = measure_sensitivity(
            _calibrated(unet, table), table, wanted, samples, rule=inputs.rule, on_run=report
        )

        def quantise(plan: PrecisionPlan) -> tuple[Pass, ...]:
            if plan.formats() <= FLOATING:
                return ()
            return quantising_passes(inputs.table, inputs.rule, plan, correct_bias=inputs.correct_bias)

        def measure_psnr(plan: PrecisionPlan) -> float:
            run = plan.with_default(Format.FP32)
            return _psnr(studio.draw_planned(run, quantise(run)), exact)

        chosen = choose_plan(wanted, sensitivity, measure_psnr, budget_db=inputs.budget_db, costs=costs)
        candidates = [] if chosen is None else [chosen]
        if measured and (psnr_db := measure_psnr(usual)) >= inputs.budget_db:
            candidates.append(planned_before(usual, sensitivity, costs, psnr_db))
    if not candidates:
        raise InputError(
            f"no layer of the UNet is faster in int8 than in {inputs.default}, by itself or with all the others",
            hint="choose a floating-point precision",
        )
    chosen, step_seconds = candidates[0], None
    if measured:
        plans = [uniform_plan(unet.model, inputs.default), *(each.plan for each in candidates)]
        seconds = {
            target.name: _time_steps(unet, plans, target, quantise, inputs.hoist).tolist() for target in inputs.targets
        }
        chosen = fastest(candidates, list(map(sum, zip(*(each[1:] for each in seconds.values()), strict=True))))
        place = 1 + candidates.index(chosen)
        step_seconds = {name: {"floating": each[0], "plan": each[place]} for name, each in seconds.items()}
    (folder / PLAN_NAME).write_text(text_from_plan(chosen.plan), encoding="utf-8")
    return {
        "budget_db": inputs.budget_db,
        "psnr_db": round(chosen.psnr_db, 2),
        "predicted_epsilon_error": float(f"{chosen.predicted_error:.3g}"),
        "layer_time": round(chosen.time, 3),
        "step_seconds": step_seconds,
        "layers": {each.value: sum(line.format is each for line in chosen.plan.layers) for each in Format},
    }


def _time_steps(
    unet: Component,
    plans: list[PrecisionPlan],
    target: Target,
    quantise: Callable[[PrecisionPlan], tuple[Pass, ...]],
    hoist: bool,
) -> np.ndarray:
    run = [plan.with_default(Format.FP32) for plan in plans] if in_float32(target) else plans
    return time_steps(unet, run, target, quantise, hoist=hoist)


def _calibrated(unet: Component, table: CalibrationTable) -> Component:
    """The graph that the table belongs to."""
    model = unet.model.clone()
    run_passes(() if table.smoothing is None else (SmoothQuant(table.smoothing),), model)
    return Component(unet.spec, model)


class _Studio:
    """Draws the same pictures with any UNet; text encoder and VAE decoder are in float32."""

    def __init__(self, drawing: HalfCheck, components: Mapping[str, Component], stack: ExitStack) -> None:
        self._drawing = drawing
        self._unet = components["unet"]
        self._sessions = {name: stack.enter_context(_open(component, stack)) for name, component in components.items()}
        self._settings, self._drawn = draw_settings(drawing, pictures=_PICTURES, steps=_STEPS)
        self._tokenizer = open_tokenizer(drawing)

    def draw_exact(self) -> tuple[list[dict[str, np.ndarray]], list[np.ndarray]]:
        """Samples of the UNet's inputs, and the pictures in float32."""
        recorder = _Sampler(self._sessions["unet"])
        pictures = self._draw(recorder)
        return [recorder.feeds[index] for index in _SAMPLED_STEPS if index < len(recorder.feeds)], pictures

    def draw_planned(self, plan: PrecisionPlan, quantise: tuple[Pass, ...]) -> list[np.ndarray]:
        """The pictures with the UNet's layers as planned."""
        planned = Component(self._unet.spec, self._unet.model.clone())
        run_passes((*passes_from_plan(plan, quantise), *lowering_passes(ONNXRUNTIME)), planned.model)
        with ExitStack() as stack:
            return self._draw(stack.enter_context(_open(planned, stack, lower=False)))

    def _draw(self, unet: Session) -> list[np.ndarray]:
        sessions = {**self._sessions, "unet": unet}
        pipeline = Pipeline(
            tokenizer=self._tokenizer,
            schedule=schedule_from_config(json.loads(self._drawing.files["scheduler/scheduler_config.json"])),
            settings=self._settings,
            specs={name: session.spec for name, session in sessions.items()},
            load_session=sessions.__getitem__,
        )
        drawn: HalfCheckSettings = self._drawn
        generations = (picture_generation(pipeline, drawn, index) for index in range(len(drawn.prompts)))
        return [pipeline.decode(pipeline.denoise(each)) for each in generations]


class _Sampler:
    """Stands in for the UNet's session and keeps what it is fed."""

    def __init__(self, session: Session) -> None:
        self.spec = session.spec
        self.feeds: list[dict[str, np.ndarray]] = []
        self._session = session

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        if len(self.feeds) <= max(_SAMPLED_STEPS):
            self.feeds.append({name: np.array(value) for name, value in feeds.items()})
        return self._session.run(feeds)

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """See `Session.hold`; it always hands everything over."""
        return lambda others: self.run({**feeds, **others})

    @property
    def memory_bytes(self) -> int:
        """As the session that it stands for."""
        return self._session.memory_bytes

    def close(self) -> None:
        """Leaves the session to its owner."""

    def __enter__(self) -> _Sampler:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _open(component: Component, stack: ExitStack, *, lower: bool = True) -> Session:
    model = component.model.clone()
    run_passes(lowering_passes(ONNXRUNTIME) if lower else (), model)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sdc-plan-"))
    save_onnx(model, Path(folder) / "model.onnx")
    return open_session(EngineSource(component.spec, ONNXRUNTIME, (Path(folder) / "model.onnx",)))


def _psnr(found: list[np.ndarray], exact: list[np.ndarray]) -> float:
    """Mean PSNR in dB of decoded pictures, whose values span 2."""
    pairs = (psnr(a.clip(-1, 1), b.clip(-1, 1), data_range=2) for a, b in zip(found, exact, strict=True))
    return float(np.mean([np.minimum(each, _EQUAL_DB) for each in pairs]))
