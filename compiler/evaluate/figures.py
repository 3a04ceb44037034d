"""The figures of a run, computed from what was kept of its pictures; also from any part of them, for the seed noise.

Names have two parts: ``bundle.``, ``reference.`` and ``change.`` (bundle minus reference) with an accuracy or
``frechet_to_real``; ``paired.`` with a distance between pictures of equal prompts and seeds.
"""

from __future__ import annotations

import numpy as np

from sdc.compiler.evaluate.frechet import Gaussian, frechet_distance
from sdc.compiler.evaluate.gather import Record
from sdc.compiler.evaluate.verdicts import accuracies, agreement, is_held_out
from sdc.compiler.tiny.judge import Verdict

ABSOLUTE = ("garment", "colour", "background", "all", "held_out", "frechet_to_real")
PAIRED = ("psnr_db", "ssim", "feature_distance", "frechet_to_reference")


def run_figures(record: Record, triples: np.ndarray, real: Gaussian | None, index: np.ndarray) -> dict[str, float]:
    """All figures of the pictures with the given indices.

    Args:
        record: of the whole run.
        triples: [N, 3], what each prompt names.
        real: features of real pictures; None without a judge.
        index: [n], which pictures count.
    """
    figures: dict[str, float] = {}
    if record.bundle is not None and real is not None:
        figures |= _absolute("bundle", record.bundle, triples, real, index)
        if record.reference is not None:
            figures |= _absolute("reference", record.reference, triples, real, index)
            figures |= {f"change.{name}": figures[f"bundle.{name}"] - figures[f"reference.{name}"] for name in ABSOLUTE}
    if record.likeness is not None:
        figures["paired.psnr_db"] = float(record.likeness.psnr_db[index].mean())
        figures["paired.ssim"] = float(record.likeness.ssim[index].mean())
    if record.bundle is not None and record.reference is not None:
        made, wanted = record.bundle.features.numpy()[index], record.reference.features.numpy()[index]
        figures["paired.feature_distance"] = float(feature_distances(made, wanted, wanted).mean())
        figures["paired.frechet_to_reference"] = frechet_distance(Gaussian.fit(made), Gaussian.fit(wanted))
    return figures


def _absolute(owner: str, verdict: Verdict, triples: np.ndarray, real: Gaussian, index: np.ndarray) -> dict[str, float]:
    correct = agreement(verdict, triples)[index]
    held_out = correct[is_held_out(triples[index])]
    figures = accuracies(correct)
    figures["held_out"] = float(held_out.all(axis=1).mean()) if len(held_out) else float("nan")
    figures["frechet_to_real"] = frechet_distance(Gaussian.fit(verdict.features.numpy()[index]), real)
    return {f"{owner}.{name}": value for name, value in figures.items()}


def feature_distances(left: np.ndarray, right: np.ndarray, population: np.ndarray) -> np.ndarray:
    """Distances of paired feature vectors, in units of the distance of two arbitrary pictures.

    Args:
        left: [N, D]; likewise `right`.
        population: [M, D], features whose root mean square distance from each other is the unit, sqrt(2 tr C).

    Returns:
        [N], float64.
    """
    unit = np.sqrt(2 * np.trace(Gaussian.fit(population).covariance))
    return np.asarray(np.linalg.norm(left.astype(np.float64) - right, axis=1) / unit)


def other_seed_figures(record: Record, period: int) -> dict[str, float]:
    """What the paired figures are between the reference's pictures and its own of the same prompts, other seeds.

    The Fréchet distance is that of two halves of the run, scaled to two whole runs: between samples of one distribution
    it falls as 1/n + 1/m.

    Args:
        record: of the whole run.
        period: pictures until the prompts begin again.
    """
    if record.other_seed is None:
        return {}
    figures = {
        "paired.psnr_db": float(record.other_seed.psnr_db.mean()),
        "paired.ssim": float(record.other_seed.ssim.mean()),
    }
    if record.reference is not None:
        features = record.reference.features.numpy()
        distances = feature_distances(features[period:], features[:-period], features)
        figures["paired.feature_distance"] = float(distances.mean())
        half = np.arange(len(features)) // period % 2 == 0
        if min(half.sum(), (~half).sum()) > 1:
            apart = frechet_distance(Gaussian.fit(features[half]), Gaussian.fit(features[~half]))
            scale = (2 / len(features)) / (1 / half.sum() + 1 / (~half).sum())
            figures["paired.frechet_to_reference"] = float(apart * scale)
    return figures


def worst_figures(record: Record) -> dict[str, tuple[float, float]]:
    """For each paired figure that every picture has: its value at the worst 5 %, and for the worst picture."""
    worst: dict[str, tuple[float, float]] = {}
    if record.likeness is not None:
        for name, values in (("psnr_db", record.likeness.psnr_db), ("ssim", record.likeness.ssim)):
            worst[f"paired.{name}"] = float(np.percentile(values, 5)), float(values.min())
    if record.bundle is not None and record.reference is not None:
        wanted = record.reference.features.numpy()
        distances = feature_distances(record.bundle.features.numpy(), wanted, wanted)
        worst["paired.feature_distance"] = float(np.percentile(distances, 95)), float(distances.max())
    return worst
