"""The figures so far, in a JSON file that a later call goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Measurement:
    """One turn of one side.

    Attributes:
        side: its key.
        component: what was run.
        threads: that it computed with.
        round: index of the round.
        seconds: of each call; of "start", from the process's start to the first denoising step.
        processor_seconds: that all calls took of all processors.
        foreign: processors that others kept busy meanwhile.
        disturbed: that was more than the limit, in each of the tries.
        peak_bytes: most memory of the process so far.
        load_seconds: that the process took to load.
        flops: of a call, where the side knows.
    """

    side: str
    component: str
    threads: int
    round: int
    seconds: list[float]
    processor_seconds: float
    foreign: float
    disturbed: bool
    peak_bytes: int
    load_seconds: float
    flops: float | None = None

    @property
    def median(self) -> float:
        """Seconds of a call in this round."""
        return float(np.median(self.seconds))


@dataclass
class Store:
    """Everything that is known.

    Attributes:
        path: the file.
        settings: what figures depend on; a file with others is refused.
        machine: what it is.
        versions: of packages, by environment.
        flops: operations of one call, by component.
        errors: relative to the reference, by side and component; None where a side gives nothing out.
        failures: reasons, by side and component ("all" for the whole side).
        measurements: in the order in which they were taken.
    """

    path: Path
    settings: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)

    def find(self, side: str, component: str, threads: int, round_: int) -> Measurement | None:
        """What was measured in a round, if it was."""
        wanted = (side, component, threads, round_)
        found = (m for m in self.measurements if (m.side, m.component, m.threads, m.round) == wanted)
        return next(found, None)

    def of(self, side: str, component: str, threads: int) -> Iterator[Measurement]:
        """All rounds of a side, undisturbed or not."""
        wanted = (side, component, threads)
        return (m for m in self.measurements if (m.side, m.component, m.threads) == wanted)

    def failure(self, side: str, component: str) -> str | None:
        """Why a side has no figure."""
        of_side = self.failures.get(side, {})
        return of_side.get("all") or of_side.get(component)

    def fail(self, side: str, component: str, reason: str) -> None:
        """Note why."""
        self.failures.setdefault(side, {})[component] = reason
        self.save()

    def save(self) -> None:
        """Write all; the file is never half written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = {name: value for name, value in asdict(self).items() if name != "path"}
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path)


def open_store(path: Path, settings: dict[str, Any]) -> Store:
    """The figures of a file, or none yet.

    Raises:
        ValueError: they were taken with other settings.
    """
    if not path.exists():
        return Store(path, settings)
    store = load_store(path)
    if store.settings != settings:
        raise ValueError(f"{path} has figures of {store.settings}, expected {settings}; give another --out")
    return store


def load_store(path: Path) -> Store:
    """The figures of a file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    measurements = [Measurement(**each) for each in values.pop("measurements")]
    return Store(path, measurements=measurements, **values)
