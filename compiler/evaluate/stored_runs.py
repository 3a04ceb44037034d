"""Runs kept on disk, so that hours of pictures can be interrupted: a reference's pictures, and the figures of others.

A file that is there is whole: it is written under another name first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.lib.format import open_memmap

from sdc.compiler.evaluate.figures import other_seed_figures, run_figures, worst_figures
from sdc.compiler.evaluate.frechet import Gaussian
from sdc.compiler.evaluate.gather import PictureMaker, Record
from sdc.compiler.evaluate.seed_noise import seed_noise
from sdc.compiler.plain_json import finite_json, write_json
from sdc.compiler.workshop.cache import digest_sources
from sdc.engines.errors import InputError
from sdc.engines.manifest import Manifest

RUNTIME_SOURCES = (
    "sdc.engines",
    "sdc.compiler.evaluate.figures",
    "sdc.compiler.evaluate.frechet",
    "sdc.compiler.evaluate.gather",
    "sdc.compiler.evaluate.metrics",
    "sdc.compiler.evaluate.seed_noise",
    "sdc.compiler.evaluate.settings",
    "sdc.compiler.evaluate.stored_runs",
    "sdc.compiler.evaluate.verdicts",
    "sdc.compiler.tiny.captions",
    "sdc.compiler.tiny.judge",
)
"""Code that pictures and the figures of them depend on."""

PIPELINE_FOLDERS = ("scheduler", "tokenizer")


@dataclass(frozen=True)
class RunFigures:
    """What is kept of a run whose pictures are gone.

    Attributes:
        figures: of all its pictures.
        noise: their standard deviation over seeds by the jackknife; empty for a run of few pictures.
        worst: PSNR in dB that one picture in twenty falls below.
        other_seed: paired figures between the reference's pictures of one prompt; empty if no prompt came twice.
    """

    figures: Mapping[str, float]
    noise: Mapping[str, float]
    worst: float
    other_seed: Mapping[str, float]

    @classmethod
    def of(cls, record: Record, triples: np.ndarray, real: Gaussian, period: int) -> Self:
        """Compute them.

        Args:
            record: with a judge's verdicts and a reference.
            triples: [N, 3], what each prompt names.
            real: features of real pictures.
            period: pictures until the prompts begin again.
        """
        part = partial(run_figures, record, triples, real)
        everything = np.arange(len(triples))
        return cls(
            figures=part(everything),
            noise=seed_noise(part, len(triples)),
            worst=worst_figures(record)["paired.psnr_db"][0],
            other_seed=other_seed_figures(record, period),
        )


def save_figures(run: RunFigures, path: Path, about: Mapping[str, Any]) -> None:
    """Write a run's figures as JSON, with what a reader should know of it; figures that are not finite as null."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")  # rows of equal engines share a file
    write_json(unfinished, finite_json({"about": dict(about), **asdict(run)}))
    unfinished.rename(path)


def load_figures(path: Path) -> RunFigures:
    """Read what `save_figures` wrote."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    parts = {
        name: {key: math.nan if value is None else value for key, value in stored[name].items()}
        for name in ("figures", "noise", "other_seed")
    }
    return RunFigures(worst=stored["worst"], **parts)


def run_digest(manifest: Manifest, target: str, measure_digests: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that change with whatever changes a run's pictures or its figures.

    That is: the target's engines, their options and libraries; schedule and tokeniser; the runtime's code; what
    measures, the judge and the statistics of real pictures, by their digests.
    """
    entry = manifest.targets[target]
    engines = {name for engine in entry.engines.values() for name in engine.files}
    files = [
        (name, file.sha256)
        for name, file in sorted(manifest.files.items())
        if name in engines or name.split("/")[0] in PIPELINE_FOLDERS
    ]
    options = {name: dict(engine.options) for name, engine in entry.engines.items()}
    everything = [files, options, dict(entry.built_with), list(measure_digests), digest_sources(RUNTIME_SOURCES)]
    return sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def stored_pictures(
    path: Path,
    make: PictureMaker,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch: int,
    progress: Callable[[int], None],
) -> PictureMaker:
    """What gives the pictures of a run again, made now unless `path` holds them.

    Args:
        path: a ``.npy`` file, [N, 3, H, W], float32; memory-mapped.
        make: makes pictures.
        prompts: of the run.
        seeds: one for each picture, all different.
        batch: pictures made at once.
        progress: told after every batch how many pictures are done.

    Returns:
        A maker that knows the run's seeds only, and takes the prompts for granted.
    """
    if not path.exists():
        unfinished = path.with_name(path.name + ".unfinished")
        pictures: np.memmap | None = None
        for begin in range(0, len(prompts), batch):
            part = slice(begin, min(begin + batch, len(prompts)))
            made = make(prompts[part], seeds[part])
            if pictures is None:
                pictures = open_memmap(unfinished, "w+", np.float32, (len(prompts), *made.shape[1:]))
            pictures[part] = made
            progress(part.stop)
        del pictures
        unfinished.rename(path)
    kept = np.load(path, mmap_mode="r")
    if len(kept) != len(prompts):
        raise InputError(f"{path} should hold {len(prompts)} pictures, found {len(kept)}", hint="remove it")
    places = {seed: place for place, seed in enumerate(seeds)}

    def look_up(_prompts: Sequence[str], wanted: Sequence[int]) -> np.ndarray:
        return np.asarray(kept[[places[seed] for seed in wanted]])

    return look_up
