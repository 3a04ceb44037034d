"""What a compression did, as JSON and as text; both are in the folder that it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdc.compiler.compress.rounds import channels_by_kind
from sdc.compiler.compress.settings import TWO_OF_FOUR, CompressSettings
from sdc.compiler.plain_json import finite_json, write_json
from sdc.compiler.text_table import format_table

JSON_FILE, TEXT_FILE = "compression.json", "compression.txt"

MOMENTS = ("with fewer blocks", "pruned", "sparse", "in low rank", "recovered")
"""Of a round, after which quality is measured, in order."""

SPEED_OF_2_4 = (
    "2:4 is faster on GPUs with sparse tensor cores alone, compute capability 8.0 or later; the targets for CPUs "
    "multiply the zeros too"
)
SPEED_OF_SHARES = "zeros anywhere make nothing faster: all targets multiply them; they only compress better in a file"


@dataclass(frozen=True)
class Report:
    """A compression that ended.

    Attributes:
        model: where the teacher is from.
        settings: of the run.
        parameters_before: of the teacher's UNet; ``parameters_after`` of the student's.
        rounds: what each removed, and the quality after it and after its recovery, as `rounds.py` and `quality.py` say.
        last_loss: mean of the last steps; None without recovery.
    """

    model: str
    settings: CompressSettings
    parameters_before: int
    parameters_after: int
    rounds: list[dict[str, Any]]
    last_loss: float | None

    @property
    def removed_share(self) -> float:
        """Of the parameters."""
        return 1 - self.parameters_after / self.parameters_before

    def to_json(self) -> dict[str, Any]:
        """For ``compression.json``."""
        return {
            "schema": 1,
            "model": self.model,
            "settings": self.settings.to_json(),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "removed_share": self.removed_share,
            "last_loss": self.last_loss,
            "rounds": self.rounds,
        }

    def to_text(self) -> str:
        """For ``compression.txt`` and the terminal."""
        lines = [
            f"{self.model}: {self.parameters_before:,} parameters of the UNet, now {self.parameters_after:,} "
            f"({100 * self.removed_share:.1f} % fewer)",
            *self._pruning_lines(),
            *self._elastic_lines(),
            *self._sparsity_lines(),
            *self._low_rank_lines(),
        ]
        quality = self._quality_rows()
        if quality:
            headers = ("round", "parameters", *(cell for when in self._moments() for cell in (f"SNR, {when}", "less")))
            lines += ["", "SNR of the prediction on held-out latents, and how much less than the teacher's, in dB:", ""]
            lines += [format_table(headers, quality)]
        return "\n".join(lines) + "\n"

    def _pruning_lines(self) -> list[str]:
        settings = self.settings
        recovery = f"{settings.recover_steps} steps of recovery"
        if not settings.parameters:
            return [f"no channels removed, student {settings.student}, {recovery}"]
        rounds = "one round"
        if settings.rounds > 1:
            rounds = f"{settings.rounds} rounds with {settings.round_steps} steps of recovery between them"
        return [
            f"importance {settings.importance}, budgets {settings.budgets}, student {settings.student}, "
            f"multiples of {settings.multiple}, {rounds}, {recovery} at the end",
            "",
            format_table(
                ("channels", "before", "after", "kept"),
                [
                    (kind, f"{before:,}", f"{after:,}", f"{100 * after / before:.0f} %")
                    for kind, (before, after) in channels_by_kind(self.rounds).items()
                    if before
                ],
            ),
        ]

    def _elastic_lines(self) -> list[str]:
        off = self.rounds[-1].get("elastic", {})
        if not self.settings.elastic:
            return []
        if not off:
            return ["", "elastic: none, since the last round narrowed no layer; give fewer --rounds"]
        units = [unit for layer in off.values() for unit in layer]
        return [
            "",
            f"elastic: {sum(map(len, units)):,} of these channels ({len(units):,} units, in {len(off)} layers) are "
            "switched off; "
            "`sdc compress restore BUNDLE --prompts FILE` switches those on that pay",
        ]

    def _sparsity_lines(self) -> list[str]:
        found = self.rounds[-1].get("sparsity")
        if found is None:
            return []
        scores, zeros = self.settings.sparsity_scores, found["zeros"]
        reasons: dict[str, list[str]] = {}
        for name, reason in found["dense"].items():
            reasons.setdefault(reason, []).append(name)
        return [
            "",
            f"sparsity {self.settings.sparsity} by {scores}: {zeros:,} weights are zero "
            f"({100 * zeros / self.parameters_after:.1f} %), in {len(found['layers'])} layers; dense are",
            *(f"  {reason}: {', '.join(names)}" for reason, names in reasons.items()),
            SPEED_OF_2_4 if self.settings.sparsity == TWO_OF_FOUR else SPEED_OF_SHARES,
        ]

    def _low_rank_lines(self) -> list[str]:
        found = self.rounds[-1].get("low_rank")
        if found is None:
            return []
        settings, before, after = self.settings, found["weights"], found["in_factors"]
        less = f" ({100 * (1 - after / before):.1f} % fewer)" if before else ""
        lost = f" ({found['lost_db']:.3f} dB less, of {settings.low_rank} allowed)" if "budget_db" in found else ""
        return [
            "",
            f"low rank with {found['energy']:.6g} of the energy{lost}, {settings.low_rank_by}: "
            f"{len(found['layers'])} layers of {before:,} weights, {after:,} once an export has made two of each{less}"
            f"; {len(found['dense'])} stay whole",
        ]

    def _moments(self) -> list[str]:
        """When quality was measured, in order."""
        return [when for when in MOMENTS if when == "recovered" or any(when in each for each in self.rounds)]

    def _quality_rows(self) -> list[tuple[str, ...]]:
        def cells(quality: dict[str, Any] | None) -> tuple[str, str]:
            return ("–", "–") if quality is None else (f"{quality['student_snr_db']:.2f}", f"{quality['lost_db']:.2f}")

        return [
            (
                str(each["round"]),
                f"{each['parameters']:,}",
                *(cell for when in self._moments() for cell in cells(each.get(when))),
            )
            for each in self.rounds
            if any(when in each for when in MOMENTS)
        ]


def write_report(report: Report, folder: Path) -> None:
    """Write both files."""
    write_json(folder / JSON_FILE, finite_json(report.to_json()))
    (folder / TEXT_FILE).write_text(report.to_text(), encoding="utf-8")
