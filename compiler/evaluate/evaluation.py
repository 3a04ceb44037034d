"""The result of an evaluation: every figure with its seed noise and with what it can be measured against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sdc.compiler.evaluate.epsilon import EpsilonRow
from sdc.compiler.evaluate.figures import ABSOLUTE, PAIRED, other_seed_figures, run_figures, worst_figures
from sdc.compiler.evaluate.gather import Record
from sdc.compiler.evaluate.seed_noise import GROUPS, seed_noise
from sdc.compiler.evaluate.settings import Settings
from sdc.compiler.evaluate.statistics import Statistics
from sdc.compiler.plain_json import finite_json


@dataclass(frozen=True)
class Figure:
    """A value and its standard deviation over seeds; None where that cannot be told."""

    value: float
    noise: float | None


@dataclass(frozen=True)
class AbsoluteRow:
    """A figure of each bundle's pictures alone.

    Attributes:
        name: one of ``figures.ABSOLUTE``; accuracies are fractions.
        bundle: of the evaluated bundle; likewise ``reference``.
        change: bundle minus reference at equal seeds, whose noise is smaller than that of either.
        real: what real pictures get (for the Fréchet distance: another sample of so many real pictures).
        autoencoder: what real pictures get after the autoencoder, the best that any UNet can reach.
    """

    name: str
    bundle: Figure
    reference: Figure | None
    change: Figure | None
    real: float | None
    autoencoder: float | None


@dataclass(frozen=True)
class PairedRow:
    """A distance between the bundle's and the reference's pictures at equal seeds.

    Attributes:
        name: one of ``figures.PAIRED``.
        value: the mean over pictures.
        worst_5_percent: the value that 5 % of the pictures are worse than.
        worst: of the worst picture.
        other_seed: the same between the reference's pictures and its own at other seeds.
    """

    name: str
    value: Figure
    worst_5_percent: float | None
    worst: float | None
    other_seed: float | None


@dataclass(frozen=True)
class Evaluation:
    """All that `sdc eval` says.

    Attributes:
        bundle: what was evaluated: path, model, precision, target; likewise ``reference``.
        settings: how the pictures were made.
        noise_method: where the noise of the figures comes from.
        absolute: empty for models that there is no judge for.
        paired: empty without a reference.
        epsilon: the UNet at each timestep.
    """

    bundle: dict[str, str]
    reference: dict[str, str] | None
    settings: Settings
    noise_method: str
    absolute: tuple[AbsoluteRow, ...]
    paired: tuple[PairedRow, ...]
    epsilon: tuple[EpsilonRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not a finite number becomes null."""
        value = finite_json(asdict(self))
        assert isinstance(value, dict)
        return value


def summarize(
    records: Sequence[Record], triples: np.ndarray, statistics: Statistics | None, *, period: int
) -> tuple[tuple[AbsoluteRow, ...], tuple[PairedRow, ...], str]:
    """Rows of the first run, their noise from the other runs if there are any, and a word on where it comes from.

    Args:
        records: runs of the same prompts with different seeds, the first of which is reported.
        triples: [N, 3], what each prompt names.
        statistics: of real pictures; None where there is no judge.
        period: pictures until the prompts begin again.
    """
    real = None if statistics is None else statistics.real
    everything = np.arange(len(triples))
    values = run_figures(records[0], triples, real, everything)
    if len(records) > 1:
        runs = [run_figures(record, triples, real, everything) for record in records]
        noise = {name: float(np.std([run[name] for run in runs], ddof=1)) for name in values}
        method = f"standard deviation over {len(records)} runs with different seeds"
    else:
        noise = seed_noise(lambda index: run_figures(records[0], triples, real, index), len(triples))
        method = f"standard deviation over seeds, by the jackknife over {GROUPS} disjoint parts of the run"
    figures = {name: Figure(value, noise.get(name)) for name, value in values.items()}
    return _absolute_rows(figures, statistics, len(triples)), _paired_rows(figures, records[0], period), method


def _absolute_rows(figures: dict[str, Figure], statistics: Statistics | None, samples: int) -> tuple[AbsoluteRow, ...]:
    if statistics is None:
        return ()
    known = statistics.figures
    floors = {name: (known[f"real_{name}"], known[f"reconstructed_{name}"]) for name in ABSOLUTE[:4]}
    sampling = known["sampling_frechet"] * (1 / samples + 1 / statistics.real.count)
    floors["frechet_to_real"] = sampling, known["reconstruction_frechet"]
    return tuple(
        AbsoluteRow(
            name=name,
            bundle=figures[f"bundle.{name}"],
            reference=figures.get(f"reference.{name}"),
            change=figures.get(f"change.{name}"),
            real=floors[name][0] if name in floors else None,
            autoencoder=floors[name][1] if name in floors else None,
        )
        for name in ABSOLUTE
        if math.isfinite(figures[f"bundle.{name}"].value)
    )


def _paired_rows(figures: dict[str, Figure], record: Record, period: int) -> tuple[PairedRow, ...]:
    other_seed = other_seed_figures(record, period)
    worst = worst_figures(record)
    return tuple(
        PairedRow(
            name=name,
            value=figures[key],
            worst_5_percent=worst[key][0] if key in worst else None,
            worst=worst[key][1] if key in worst else None,
            other_seed=other_seed.get(key),
        )
        for name in PAIRED
        if (key := f"paired.{name}") in figures
    )
