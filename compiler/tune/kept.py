"""Measurements kept on disk, so that a search that was interrupted goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

from sdc.compiler.tune.search import Measurement, MeasureWay
from sdc.engines.checked_json import JsonValue
from sdc.engines.preset import Way, read_way

NAME = "measured.jsonl"


class KeptMeasurements:
    """A `MeasureWay` that asks another one for what it has not on its file: a JSON line for each measurement.

    Args:
        folder: has the file; made for all that measurements depend on but the way and the number of pictures.
        bundle: whose ways are measured; where it lies may change between calls.
        measure: measures.
    """

    def __init__(self, folder: Path, bundle: Path, measure: MeasureWay) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / NAME
        self._measure = measure
        self._known = {(each.way, each.pictures): each for each in read_measurements(self._path, bundle)}

    def __call__(self, way: Way, pictures: int) -> Measurement:
        """Measure now, or take what was measured before."""
        if (way, pictures) not in self._known:
            found = self._measure(way, pictures)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found.to_json()) + "\n")
            self._known[way, pictures] = found
        return self._known[way, pictures]


def read_measurements(path: Path, bundle: Path) -> list[Measurement]:
    """Those of a bundle on a file, up to one that was not written to its end."""
    found: list[Measurement] = []
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    kept = lines[:-1]  # what no line feed ends is half a line
    for line in kept:
        value = json.loads(line)
        way = read_way(JsonValue(value["way"], path.name))
        found.append(Measurement(**{**value, "bundle": bundle, "way": way}))
    if lines[-1]:
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return found
