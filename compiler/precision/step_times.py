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
from sdc.engines.targets import Target
from sdc.passes.base import Pass, run_passes

_ROUNDS = 9
_SECONDS = 0.3
"""That an engine runs for at a time: the threads of the one before it spin for a while, on the cores of this one."""
_MOST_RUNS = 50


def time_steps(
    unet: Component,
    phases: Sequence[Sequence[Pass]],
    target: Target,
    *,
    hoist: bool,
) -> np.ndarray:
    """Seconds of the UNet's engine in each precision, at the sizes that it is tuned for, in turn: [phases].

    The least of several rounds: what else the machine does can only add to it, and may last for half of them.

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
        runs = int(np.clip(_SECONDS / once, 1, _MOST_RUNS))
        several = [partial(_run_often, call, runs) for call in calls]
        return np.asarray(seconds_in_turn(several, rounds=_ROUNDS, warm_ups=1).min(axis=0)) / runs


def _run_often(call: Callable[[], object], runs: int) -> None:
    for _ in range(runs):
        call()
