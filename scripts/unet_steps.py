"""The UNet's engine in bundles of `tiny`: seconds of a step, bundles in turn, and bytes; and the text of a ratio."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sdc.compiler.evaluate.opened import OpenedBundle
from sdc.compiler.evaluate.settings import JUDGED_MODEL, prompts_of_model
from sdc.engines.bundle import open_bundle

UNET_PARTS = ("unet", "unet_prompt", "unet_timestep")
TIMED_ROUNDS = 45


def time_in_turn(bundles: list[OpenedBundle]) -> np.ndarray:
    """Median seconds of each bundle's step in a picture, after one that is not counted: [rounds, bundles]."""
    for bundle in bundles:
        step_seconds(bundle)
    seconds = np.empty((TIMED_ROUNDS, len(bundles)))
    for index in range(TIMED_ROUNDS):
        for place in range(len(bundles)):
            which = (index + place) % len(bundles)  # none is always the first of a round
            seconds[index, which] = step_seconds(bundles[which])
    return seconds


def step_seconds(bundle: OpenedBundle) -> float:
    """Of the median step of one picture: threads of the bundle before spin during the first ones."""
    seconds: list[float] = []
    generation = bundle.plan(prompts_of_model(JUDGED_MODEL, 1), [0])
    bundle.pipeline.denoise(generation, on_step=lambda step: seconds.append(step.seconds))
    return float(np.median(seconds))


def unet_bytes(bundle: Path, target: str) -> int:
    """Of the files of the UNet and its hoisted parts."""
    manifest = open_bundle(bundle).manifest
    engines = manifest.targets[target].engines
    files = {name for part in UNET_PARTS if part in engines for name in engines[part].files}
    return sum(manifest.files[name].bytes for name in files)


def ratio_text(taken: np.ndarray, others: np.ndarray) -> str:
    """The median of ratios, and quartiles."""
    low, median, high = np.quantile(taken / others, (0.25, 0.5, 0.75))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"
