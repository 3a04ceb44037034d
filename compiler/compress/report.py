"""What a compression did, as JSON and as text; both are in the folder that it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdc.compiler.compress.rounds import channels_by_kind
from sdc.compiler.compress.settings import CompressSettings
from sdc.compiler.plain_json import finite_json, write_json
from sdc.compiler.text_table import format_table

JSON_FILE, TEXT_FILE = "compression.json", "compression.txt"


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
        settings = self.settings
        lines = [
            f"{self.model}: {self.parameters_before:,} parameters of the UNet, now {self.parameters_after:,} "
            f"({100 * self.removed_share:.1f} % fewer)",
            f"importance {settings.importance}, budgets {settings.budgets}, student {settings.student}, "
            f"multiples of {settings.multiple}, {settings.rounds} rounds, "
            f"{settings.round_steps} and {settings.recover_steps} steps of recovery",
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
        quality = self._quality_rows()
        if quality:
            headers = ("round", "parameters", "SNR, pruned", "less", "SNR, recovered", "less")
            lines += ["", "SNR of the prediction on held-out latents, and how much less than the teacher's, in dB:", ""]
            lines += [format_table(headers, quality)]
        return "\n".join(lines) + "\n"

    def _quality_rows(self) -> list[tuple[str, ...]]:
        def cells(quality: dict[str, Any] | None) -> tuple[str, str]:
            return ("–", "–") if quality is None else (f"{quality['student_snr_db']:.2f}", f"{quality['lost_db']:.2f}")

        return [
            (str(each["round"]), f"{each['parameters']:,}", *cells(each.get("pruned")), *cells(each.get("recovered")))
            for each in self.rounds
            if "pruned" in each
        ]


def write_report(report: Report, folder: Path) -> None:
    """Write both files."""
    write_json(folder / JSON_FILE, finite_json(report.to_json()))
    (folder / TEXT_FILE).write_text(report.to_text(), encoding="utf-8")
