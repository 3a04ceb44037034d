"""Whole UNets timed on the targets that run here, one plan against another."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from sdc.compiler.build import build_engine
from sdc.compiler.compare.outputs import draw_feeds, seconds_in_turn
from sdc.compiler.component import Component
from sdc.compiler.hoisting import hoist_component
from sdc.compiler.precision.planning import passes_from_plan
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.targets import Target
from sdc.passes.base import Pass, run_passes
from sdc.passes.pipeline import lowering_passes
from sdc.passes.precision.plan import PrecisionPlan

_ROUNDS = 9


def time_steps(
    unet: Component,
    plans: Sequence[PrecisionPlan],
    target: Target,
    quantise: Callable[[PrecisionPlan], tuple[Pass, ...]],
    *,
    hoist: bool,
) -> np.ndarray:
    """Seconds of the UNet's engine under each plan, at the sizes that it is tuned for, in turn: [plans], medians.

    Args:
        unet: the fused graph in float32; it is not changed.
        plans: of its layers.
        target: runs on this machine.
        quantise: the passes that put a plan's integers into the graph.
        hoist: whether what does not change between steps is taken out, and not timed.
    """
    with ExitStack() as stack:
        calls = []
        for plan in plans:
            typed = Component(unet.spec, unet.model.clone())
            run_passes(passes_from_plan(plan, quantise(plan)), typed.model)
            step = hoist_component(typed)[0][0] if hoist else typed
            run_passes(lowering_passes(target.backend), step.model)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sdc-step-")))
            built = build_engine(step, target, folder)
            files = tuple(folder / name for name in built.files)
            session = stack.enter_context(open_session(EngineSource(step.spec, target.backend, files, built.options)))
            calls.append(partial(session.run, draw_feeds(step.spec, seed=0)))
        return np.asarray(np.median(seconds_in_turn(calls, rounds=_ROUNDS), axis=0))
