"""Whole UNets timed on the targets that run here, one plan against another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np

from sdc.compiler.compare.outputs import draw_feeds, seconds_in_turn
from sdc.compiler.component import Component
from sdc.compiler.hoisting import hoist_component
from sdc.compiler.precision.layer_times import open_lowered
from sdc.compiler.precision.planning import passes_from_plan
from sdc.engines.targets import Target
from sdc.passes.base import Pass, run_passes
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
            session = open_lowered(step, target, stack)
            calls.append(partial(session.run, draw_feeds(step.spec, seed=0)))
        return np.asarray(np.median(seconds_in_turn(calls, rounds=_ROUNDS), axis=0))
