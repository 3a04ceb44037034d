"""Runs kept on disk, so that hours of pictures can be interrupted: a reference's pictures, and what was seen of others.

A file that is there is whole: it is written under another name first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from safetensors.numpy import load_file, save_file

from sdc.compiler.evaluate.gather import Likeness, PictureMaker, Record
from sdc.compiler.tiny.judge import Verdict
from sdc.compiler.workshop.cache import digest_sources
from sdc.engines.errors import InputError
from sdc.engines.manifest import Manifest

VERDICT_FIELDS = ("features", "garments", "colours", "backgrounds")
LIKENESS_FIELDS = ("psnr_db", "ssim")

RUNTIME_SOURCES = (
    "sdc.engines",
    "sdc.compiler.evaluate.gather",
    "sdc.compiler.evaluate.metrics",
    "sdc.compiler.tiny.judge",
)
"""Code that pictures and what is seen of them depend on."""

PIPELINE_FOLDERS = ("scheduler", "tokenizer")


def run_digest(manifest: Manifest, target: str, judge_digest: str) -> str:
    """Sixteen hexadecimal digits that change with whatever changes a run's pictures or what is seen of them.

    That is: the target's engines, their options and libraries; schedule and tokeniser; the runtime's code; the judge.
    """
    entry = manifest.targets[target]
    engines = {name for engine in entry.engines.values() for name in engine.files}
    files = [
        (name, file.sha256)
        for name, file in sorted(manifest.files.items())
        if name in engines or name.split("/")[0] in PIPELINE_FOLDERS
    ]
    options = {name: dict(engine.options) for name, engine in entry.engines.items()}
    everything = [files, options, dict(entry.built_with), judge_digest, digest_sources(RUNTIME_SOURCES)]
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


def save_record(record: Record, path: Path) -> None:
    """Write a record that has everything, a judge's verdicts and a reference, as safetensors."""
    arrays: dict[str, np.ndarray] = {}
    for owner in ("bundle", "reference"):
        verdict = getattr(record, owner)
        arrays |= {f"{owner}.{name}": getattr(verdict, name).numpy() for name in VERDICT_FIELDS}
    arrays |= {f"likeness.{name}": getattr(record.likeness, name) for name in LIKENESS_FIELDS}
    if record.other_seed is not None:
        arrays |= {f"other_seed.{name}": getattr(record.other_seed, name) for name in LIKENESS_FIELDS}
    unfinished = path.with_name(path.name + ".unfinished")
    save_file(arrays, unfinished)
    unfinished.rename(path)


def load_record(path: Path) -> Record:
    """Read what `save_record` wrote."""
    arrays = load_file(path)
    bundle, reference = (
        Verdict(*(torch.from_numpy(arrays[f"{owner}.{name}"]) for name in VERDICT_FIELDS))
        for owner in ("bundle", "reference")
    )
    likeness = Likeness(*(arrays[f"likeness.{name}"] for name in LIKENESS_FIELDS))
    other = None
    if "other_seed.psnr_db" in arrays:
        other = Likeness(*(arrays[f"other_seed.{name}"] for name in LIKENESS_FIELDS))
    return Record(bundle, reference, likeness, other)
