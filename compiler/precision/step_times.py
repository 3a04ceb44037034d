"""Whole UNets timed on the targets that run here, one plan against another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np

from sdc.compiler.compare.outputs import draw_feeds, seconds_in_turn
from sdc.compiler.component import Component
from sdc.compiler.hoisting import hoist_component
from sdc.compiler.precision.layer_times import open_lowered
from sdc.engines.targets import Target
from sdc.passes.base import Pass, run_passes

_LEAST_ROUNDS, _MOST_ROUNDS = 9, 200
_SECONDS = 2.0
"""That each plan is timed for, so that short steps get more rounds."""


def time_steps(
    unet: Component,
    phases: Sequence[Sequence[Pass]],
    target: Target,
    *,
    hoist: bool,
) -> np.ndarray:
    """Seconds of the UNet's engine in each precision, at the sizes that it is tuned for, in turn: [phases], medians.

    Args:
        unet: the fused graph in float32; it is not changed.
        phases: the passes that give the graph each precision.
        target: runs on this machine.
        hoist: whether what does not change between steps is taken out, and not timed.
    """
    with ExitStack() as stack:
        calls = []
        for phase in phases:
            typed = Component(unet.spec, unet.model.clone())
            run_passes(phase, typed.model)
            step = hoist_component(typed)[0][0] if hoist else typed
            session = open_lowered(step, target, stack)
            calls.append(partial(session.run, draw_feeds(step.spec, seed=0)))
        once = seconds_in_turn(calls, rounds=1).mean()
        rounds = int(np.clip(_SECONDS / once, _LEAST_ROUNDS, _MOST_ROUNDS))
        return np.asarray(np.median(seconds_in_turn(calls, rounds=rounds), axis=0))
