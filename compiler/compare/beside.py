"""What runs outside of the denoising loop, run before the engine that is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from sdc.compiler.compare.outputs import seconds_in_turn
from sdc.compiler.compare.variants import Variant
from sdc.engines.sessions import open_session

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class StepCall:
    """One call of the engine that runs at each step.

    Attributes:
        feeds: what it takes, results of the engines beside it among it.
        beside_seconds: median of a call of each engine beside it, by its name; None if there is none.
    """

    feeds: Feeds
    beside_seconds: Mapping[str, float] | None


def run_beside(variant: Variant, feeds: Feeds, *, rounds: int, threads: int | None) -> StepCall:
    """Run the engines beside a variant's own, one after the other.

    Args:
        variant: built.
        feeds: of the graph as it was exported.
        rounds: timed calls.
        threads: CPU threads; None leaves it to the backend.
    """
    if not variant.beside:
        return StepCall(feeds, None)
    values = dict(feeds)
    seconds = {}
    for source in variant.beside:
        taken = {tensor.name: feeds[tensor.name] for tensor in source.spec.inputs}
        with open_session(source, threads=threads) as session:
            values |= session.run(taken)
            timed = seconds_in_turn([partial(session.run, taken)], rounds=rounds)
        seconds[source.spec.name] = float(np.median(timed))
    assert variant.source is not None
    return StepCall({tensor.name: values[tensor.name] for tensor in variant.source.spec.inputs}, seconds)
