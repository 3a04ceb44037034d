"""What a calibration says: ranges by method, outlier channels, and how ranges move along the denoising."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdc.compiler.calibration.table_file import read_table
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.outliers import Outlier, find_outliers
from sdc.passes.precision.timestep_drift import (
    choose_timesteps,
    coverage,
    drift_of_tensors,
    relative_magnitudes,
    uniform_timesteps,
)

SHOWN = 8
"""Rows of each list in the text."""

COUNTS = (1, 2, 4)
"""Numbers of timesteps whose coverage is told."""


@dataclass(frozen=True)
class Choice:
    """Timesteps that cover the ranges, and evenly spread ones.

    Attributes:
        timesteps: the chosen ones.
        covered: share of the ranges that they show; likewise ``covered_evenly``.
    """

    timesteps: tuple[float, ...]
    covered: float
    covered_evenly: float


@dataclass(frozen=True)
class CalibrationDescription:
    """A calibration, described.

    Attributes:
        path: of the file.
        table: what it holds.
        outliers: channels far above their tensor's median, the worst first.
        drift: largest magnitude over that of the quietest timestep, by tensor, the most moving first.
        choices: for few timesteps, which show most.
    """

    path: str
    table: CalibrationTable
    outliers: tuple[Outlier, ...]
    drift: dict[str, float]
    choices: tuple[Choice, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the histograms."""
        table = self.table
        return {
            "path": self.path,
            "graph_digest": table.graph_digest,
            "prompts": list(table.prompts),
            "seed": table.seed,
            "timesteps": list(table.timesteps),
            "smoothing": None if table.smoothing is None else table.smoothing.rule.label,
            "tensors": {name: {"low": each.seen.low, "high": each.seen.high} for name, each in table.tensors.items()},
            "ranges": {rule: {name: list(each) for name, each in rows.items()} for rule, rows in table.ranges.items()},
            "outliers": [asdict(each) for each in self.outliers],
            "drift": self.drift,
            "choices": [asdict(each) for each in self.choices],
        }


def inspect_calibration(path: Path) -> CalibrationDescription:
    """Describe a ``calibration/unet.json``.

    Raises:
        InputError: the file cannot be read, or is no calibration.
    """
    table = read_table(path)
    magnitudes = relative_magnitudes(table)
    choices = []
    for count in (each for each in COUNTS if each < len(table.timesteps)):
        chosen = choose_timesteps(magnitudes, count)
        choices.append(
            Choice(
                tuple(table.timesteps[index] for index in chosen),
                coverage(magnitudes, chosen),
                coverage(magnitudes, uniform_timesteps(len(table.timesteps), count)),
            )
        )
    return CalibrationDescription(
        str(path), table, tuple(find_outliers(table)), drift_of_tensors(table), tuple(choices)
    )


def format_calibration(description: CalibrationDescription) -> str:
    """The description for people."""
    table = description.table
    smoothed = "not smoothed" if table.smoothing is None else f"smoothed with {table.smoothing.rule.label}"
    lines = [
        f"{description.path}: {len(table.tensors)} tensors of the graph {table.graph_digest[:12]}, {smoothed}",
        f"  {len(table.prompts)} prompts from seed {table.seed}, {table.sampler}, {len(table.timesteps)} timesteps, "
        f"latents {table.latent_size[0]}x{table.latent_size[1]}, guidance {table.guidance_scale:g}",
        f"  ranges stored for: {'; '.join(table.ranges) or 'no method'}",
        "",
        f"{len(description.outliers)} outlier channels (largest magnitude, times the tensor's median channel):",
        *(
            f"  {each.tensor} [{each.channel}]: {each.magnitude:.4g}, {each.ratio:.3g} x"
            for each in description.outliers[:SHOWN]
        ),
        "",
        "largest drift (largest magnitude, times that of the quietest timestep):",
        *(f"  {name}: {drift:.3g} x" for name, drift in list(description.drift.items())[:SHOWN]),
        "",
        "timesteps that show most of the ranges:",
        *(
            f"  {', '.join(f'{each:g}' for each in choice.timesteps)}: {choice.covered:.1%} "
            f"(evenly spread: {choice.covered_evenly:.1%})"
            for choice in description.choices
        ),
    ]
    return "\n".join(lines)
