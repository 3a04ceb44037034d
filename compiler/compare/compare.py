"""`sdc compare`: the whole comparison of two subjects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sdc.compiler.compare.comparison import Comparison, ComponentComparison, ComponentSide
from sdc.compiler.compare.footprint import Footprint, take_footprint
from sdc.compiler.compare.outputs import (
    OutputDifference,
    Timing,
    compare_outputs,
    draw_feeds,
    seconds_in_turn,
    timing_from_seconds,
)
from sdc.compiler.compare.pictures import compare_pictures
from sdc.compiler.compare.subject import LONE_COMPONENT, Subject, open_subject
from sdc.compiler.evaluate.settings import Settings
from sdc.engines.errors import InputError
from sdc.engines.specs import COMPONENTS, TensorSpec

Feeds = Mapping[str, np.ndarray]


def compare(
    first_path: Path,
    second_path: Path,
    settings: Settings,
    *,
    rounds: int = 7,
    pictures: bool = True,
    prompts: Sequence[str] | None = None,
    footprints: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Compare graphs, kernels, memory, outputs, times, denoising steps and pictures.

    Args:
        first_path: a bundle or an .onnx file; differences and ratios are relative to it.
        second_path: likewise.
        settings: the target, threads and seed of everything, and the number and making of the pictures.
        rounds: timed calls of each engine.
        pictures: whether to make any; the denoising steps come with them.
        prompts: of the pictures, used in turn; None takes the model's own.
        footprints: whether to measure memory and count kernels, in a process for each component of each side.
        say: told what is being done.

    Raises:
        BundleError: a bundle is damaged.
        InputError: the two have no component in common, or inputs that differ.
        TargetError: a bundle does not have the target.
    """
    first, second = (open_subject(path, settings.target) for path in (first_path, second_path))
    names = _common_components(first, second)
    components = []
    for name in names:
        say(name)
        components.append(_compare_component(name, first, second, settings, rounds=rounds, footprints=footprints))
    notes = _lonely_components(first, second)
    made = None
    if first.bundle is None or second.bundle is None:
        notes.append("pictures need two bundles")
    elif first.unrunnable or second.unrunnable:
        notes.append("pictures need engines that run here")
    elif pictures:
        made = compare_pictures(first_path, second_path, settings, prompts=prompts, say=say)
    denoising, picture_comparison, pairs = made or (None, None, None)
    return Comparison(
        first=first.describe(),
        second=second.describe(),
        components=tuple(components),
        denoising=denoising,
        pictures=picture_comparison,
        pairs=pairs,
        notes=tuple(notes),
    )


def _common_components(first: Subject, second: Subject) -> list[str]:
    """In the order of the pipeline; components that only a newer bundle has come after those that all have."""
    common = [name for name in first.engines if name in second.engines]
    if not common:
        raise InputError(
            f"{first.path} has {', '.join(first.engines)} and {second.path} has {', '.join(second.engines)}: "
            "nothing to compare",
            hint="give two bundles or two .onnx files",
        )
    order = (*COMPONENTS, LONE_COMPONENT)
    return sorted(common, key=lambda name: order.index(name) if name in order else len(order))


def _lonely_components(first: Subject, second: Subject) -> list[str]:
    return [
        f"only {side.path} has {name}: it has {side.engines[name].nodes} nodes"
        for side, other in ((first, second), (second, first))
        for name in side.engines
        if name not in other.engines
    ]


def _compare_component(
    name: str, first: Subject, second: Subject, settings: Settings, *, rounds: int, footprints: bool
) -> ComponentComparison:
    reasons = "; ".join(f"{side.path}: {side.unrunnable}" for side in (first, second) if side.unrunnable)
    outputs: tuple[OutputDifference, ...] = ()
    timing, not_compared = None, None
    prints: list[Footprint | None] = [None, None]
    if not reasons:
        not_compared = _difference_of_interfaces(first, second, name)
        sides = (first, second)
        feeds = [draw_feeds(side.specs[name], seed=settings.seed) for side in sides]
        if footprints:
            prints = [
                take_footprint(side.source(name), each, threads=settings.threads)
                for side, each in zip(sides, feeds, strict=True)
            ]
        outputs, timing = _run_both(
            name, first, second, feeds, threads=settings.threads, rounds=rounds, same=not_compared is None
        )
    left, right = first.engines[name].operators, second.engines[name].operators
    return ComponentComparison(
        name=name,
        first=_side(first, name, prints[0]),
        second=_side(second, name, prints[1]),
        operators={operator: (left.get(operator, 0), right.get(operator, 0)) for operator in sorted({*left, *right})},
        outputs=outputs,
        timing=timing,
        not_run=reasons or None,
        not_compared=not_compared,
    )


def _side(subject: Subject, name: str, footprint: Footprint | None) -> ComponentSide:
    engine = subject.engines[name]
    return ComponentSide(
        nodes=engine.nodes,
        file_bytes=engine.bytes,
        execution=None if footprint is None else footprint.execution,
        peak_memory_bytes=None if footprint is None else footprint.peak_memory_bytes,
    )


def _run_both(
    name: str, first: Subject, second: Subject, feeds: Sequence[Feeds], *, threads: int | None, rounds: int, same: bool
) -> tuple[tuple[OutputDifference, ...], Timing]:
    with first.open_session(name, threads=threads) as one, second.open_session(name, threads=threads) as other:
        outputs = compare_outputs(one.run(feeds[0]), other.run(feeds[1])) if same else ()
        seconds = seconds_in_turn([lambda: one.run(feeds[0]), lambda: other.run(feeds[1])], rounds=rounds)
    return outputs, timing_from_seconds(seconds[:, 0], seconds[:, 1])


def _difference_of_interfaces(first: Subject, second: Subject, name: str) -> str | None:
    """Why the two cannot be given the same feeds, or give other things; None if they can be compared.

    Components of bundles may differ, as a UNet does whose invariant parts are engines of their own, or which takes keys
    with their heads split: such are timed each with its own feeds, and compared by the denoising steps.

    Raises:
        InputError: the inputs of lone files differ.
    """
    left, right = first.specs[name], second.specs[name]
    if first.bundle is None or second.bundle is None:
        if {(each.name, each.dtype) for each in left.inputs} == {(each.name, each.dtype) for each in right.inputs}:
            return None
        raise InputError(f"{name}: {_told('inputs', left.inputs, right.inputs)}", hint="compare engines of one model")
    for what, one, other in (("inputs", left.inputs, right.inputs), ("outputs", left.outputs, right.outputs)):
        if set(one) != set(other):
            return _told(what, one, other)
    sizes = [{symbol: allowed.optimum for symbol, allowed in spec.dimensions.items()} for spec in (left, right)]
    if sizes[0] != sizes[1]:
        return f"they are tuned for different sizes: {_told_sizes(sizes[0])} and {_told_sizes(sizes[1])}"
    return None


def _told_sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{symbol} {size}" for symbol, size in sizes.items())


def _told(what: str, first: Sequence[TensorSpec], second: Sequence[TensorSpec]) -> str:
    """Tensors that only one side has; of many, the first."""

    def only(side: Sequence[TensorSpec], other: Sequence[TensorSpec]) -> str:
        lone = [each for each in side if each not in other]
        if not lone:
            return "nothing"
        shape = ", ".join(map(str, lone[0].shape))
        more = f" and {len(lone) - 1} more" if len(lone) > 1 else ""
        return f"{lone[0].name} {lone[0].dtype} [{shape}]{more}"

    return f"the {what} differ: only the first has {only(first, second)}, only the second {only(second, first)}"
