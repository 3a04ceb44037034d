"""`sdc compare`: the whole comparison of two subjects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sdc.compiler.compare.comparison import Comparison, ComponentComparison, PictureComparison
from sdc.compiler.compare.outputs import OutputDifference, compare_outputs, draw_feeds, time_in_turn
from sdc.compiler.compare.subject import LONE_COMPONENT, Subject, open_subject
from sdc.compiler.evaluate.metrics import PSNR_CEILING_DB, psnr
from sdc.compiler.evaluate.opened import OpenedBundle, opened
from sdc.compiler.evaluate.settings import Settings, prompts_of_model
from sdc.engines.errors import InputError
from sdc.engines.specs import COMPONENTS, ComponentSpec


def compare(
    first_path: Path,
    second_path: Path,
    settings: Settings,
    *,
    rounds: int = 7,
    pictures: bool = True,
    say: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare graphs, outputs, times and pictures.

    Args:
        first_path: a bundle or an .onnx file; differences and ratios are relative to it.
        second_path: likewise.
        settings: the target, threads and seed of everything, and the number and making of the pictures.
        rounds: timed calls of each engine.
        pictures: whether to make any.
        say: told what is being done.

    Raises:
        BundleError: a bundle is damaged.
        InputError: the two have no component in common, or inputs that differ.
        TargetError: a bundle does not have the target.
    """
    first, second = (open_subject(path, settings.target) for path in (first_path, second_path))
    names = [name for name in (*COMPONENTS, LONE_COMPONENT) if name in first.engines and name in second.engines]
    if not names:
        raise InputError(
            f"{first.path} has {', '.join(first.engines)} and {second.path} has {', '.join(second.engines)}: "
            "nothing to compare",
            hint="give two bundles or two .onnx files",
        )
    components = []
    for name in names:
        if say is not None:
            say(name)
        components.append(_compare_component(name, first, second, settings, rounds=rounds))
    made, notes = None, []
    if first.bundle is None or second.bundle is None:
        notes.append("pictures need two bundles")
    elif first.unrunnable or second.unrunnable:
        notes.append("pictures need engines that run here")
    elif pictures:
        if say is not None:
            say("pictures")
        made = _compare_pictures(first_path, second_path, settings)
    return Comparison(first.describe(), second.describe(), tuple(components), made, tuple(notes))


def _compare_component(
    name: str, first: Subject, second: Subject, settings: Settings, *, rounds: int
) -> ComponentComparison:
    left, right = first.engines[name], second.engines[name]
    reasons = [f"{side.path}: {side.unrunnable}" for side in (first, second) if side.unrunnable]
    outputs: tuple[OutputDifference, ...] = ()
    timing = None
    if not reasons:
        _check_inputs(first.specs[name], second.specs[name])
        feeds = draw_feeds(first.specs[name], seed=settings.seed)
        threads = settings.threads
        with first.open_session(name, threads=threads) as one, second.open_session(name, threads=threads) as other:
            outputs = compare_outputs(one.run(feeds), other.run(feeds))
            timing = time_in_turn(one, other, feeds, rounds=rounds)
    return ComponentComparison(
        name=name,
        first_nodes=left.nodes,
        second_nodes=right.nodes,
        first_bytes=left.bytes,
        second_bytes=right.bytes,
        operators={
            operator: (left.operators.get(operator, 0), right.operators.get(operator, 0))
            for operator in sorted({*left.operators, *right.operators})
        },
        outputs=outputs,
        timing=timing,
        not_run="; ".join(reasons) or None,
    )


def _check_inputs(first: ComponentSpec, second: ComponentSpec) -> None:
    """Both must take the feeds that are drawn for the first."""
    left, right = ({(each.name, each.dtype) for each in spec.inputs} for spec in (first, second))
    if left != right:
        told = " and ".join(", ".join(f"{name} {dtype}" for name, dtype in sorted(side)) for side in (left, right))
        raise InputError(f"{first.name}: the inputs differ: {told}", hint="compare engines of the same model")


def _compare_pictures(first: Path, second: Path, settings: Settings) -> PictureComparison:
    with opened(first, settings) as one, opened(second, settings) as other:
        prompts = prompts_of_model(one.manifest.model.name, settings.samples)
        batch = min(one.largest_batch(), other.largest_batch(), settings.batch or settings.samples)
        made = [_make(side, prompts, settings, batch) for side in (one, other)]
    if made[0].shape != made[1].shape:
        raise InputError(f"the pictures have the shapes {made[0].shape} and {made[1].shape}")
    values = np.minimum(psnr(made[0], made[1]), PSNR_CEILING_DB)
    return PictureComparison(tuple(values.tolist()), settings)


def _make(side: OpenedBundle, prompts: list[str], settings: Settings, batch: int) -> np.ndarray:
    seeds = settings.picture_seeds()
    return np.concatenate(
        [side.make_pictures(prompts[i : i + batch], seeds[i : i + batch]) for i in range(0, len(prompts), batch)]
    )
