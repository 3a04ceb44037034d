"""`sdc tune`: measures, chooses, and writes a copy of the chosen bundle that has the choice as its preset."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from sdc.compiler.bundle.writer import (
    BundleFile,
    CachedFile,
    check_new_place,
    file_entries,
    json_bytes,
    write_bundle,
)
from sdc.compiler.evaluate.settings import Settings
from sdc.compiler.plain_json import finite_json
from sdc.compiler.tune.budget import Budget
from sdc.compiler.tune.candidates import Candidate, open_candidates, open_reference, short_names
from sdc.compiler.tune.choices import Space, abilities_of
from sdc.compiler.tune.kept import KeptMeasurements
from sdc.compiler.tune.measure import MeasuredSchedules, opened_bench, way_of_settings
from sdc.compiler.tune.search import Measurement, fastest_within, on_all, search
from sdc.compiler.workshop.progress import Progress, Silent, StageLog
from sdc.compiler.workshop.staging import exclusive
from sdc.engines.bundle import Bundle
from sdc.engines.errors import InputError
from sdc.engines.preset import Preset, Way

TUNING_REPORT = "reports/tune.json"
"""All measurements, in the copy."""


@dataclass(frozen=True)
class TuneRequest:
    """What was asked for.

    Attributes:
        bundles: of one model; they stay as they are.
        out: a copy of one of them.
        budget: what pictures have to keep to.
        settings: how the reference draws, without shortcuts; ``samples`` are the pictures that the last ways are
            measured on.
        reference: a bundle whose pictures and times all are compared with; None for the first of ``bundles``.
        rounds: of timed pictures.
    """

    bundles: tuple[Path, ...]
    out: Path
    budget: Budget
    settings: Settings
    reference: Path | None = None
    rounds: int = 5

    @property
    def reference_bundle(self) -> Path:
        """Draws the reference."""
        return self.bundles[0] if self.reference is None else self.reference


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Attributes:
        request: what was asked for.
        model: the chosen bundle's; likewise ``precision`` and ``target``.
        reference_target: of the bundle that drew the reference.
        measurements: all, bundle by bundle, in order.
        chosen: the fastest of those on all pictures that keep to the budget; its bundle is the one that is copied.
    """

    request: TuneRequest
    model: str
    precision: str
    target: str
    reference_target: str
    measurements: tuple[Measurement, ...]
    chosen: Measurement

    @property
    def preset(self) -> Preset:
        """What goes into the copy."""
        budget, reference = self.request.budget, self.request.reference_bundle
        is_own = reference.resolve() == self.chosen.bundle.resolve()
        name = short_names([reference, self.chosen.bundle])[reference]
        return Preset(
            way=self.chosen.way,
            budget=str(budget),
            quality=self.chosen.quality,
            pictures=self.chosen.pictures,
            speed_up=1 / self.chosen.ratio,
            reference=way_of_settings(self.request.settings),
            target=self.target,
            cached=cached_ways(self.measurements, budget, self.chosen),
            reference_bundle=None if is_own else f"{name} on {self.reference_target}",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        request, settings = self.request, self.request.settings
        value = finite_json(
            {
                "bundle": str(self.chosen.bundle),
                "bundles": [str(path) for path in request.bundles],
                "reference": None if request.reference is None else str(request.reference),
                "model": self.model,
                "precision": self.precision,
                "target": self.target,
                "reference_target": self.reference_target,
                "budget": str(request.budget),
                "settings": asdict(settings),
                "rounds": request.rounds,
                "chosen": self.chosen.to_json(),
                "measurements": [each.to_json() for each in self.measurements],
            }
        )
        assert isinstance(value, dict)
        return value


def cached_ways(measurements: Sequence[Measurement], budget: Budget, chosen: Measurement) -> tuple[Way, ...]:
    """For each sampler and number of steps the chosen bundle's fastest way with DeepCache within the budget.

    Each way counts by its measurement on most pictures; for the chosen one's sampler and steps it is the chosen one, if
    that has DeepCache.
    """
    latest: dict[Way, Measurement] = {}
    for each in measurements:
        if each.bundle != chosen.bundle:
            continue
        if each.way not in latest or each.pictures >= latest[each.way].pictures:
            latest[each.way] = each
    found: dict[tuple[str, int], list[Measurement]] = {}
    for each in latest.values():
        if each.way.deepcache != 1:
            found.setdefault((each.way.sampler, each.way.steps), []).append(each)
    if chosen.way.deepcache != 1:
        found[chosen.way.sampler, chosen.way.steps] = [chosen]
    best = (fastest_within(each, budget) for each in found.values())
    return tuple(each.way for each in best if each is not None)


def tune(request: TuneRequest, *, progress: Progress | None = None) -> Tuning:
    """Find the fastest way within the budget and write the copy; until it is whole nothing is at its place.

    What was measured is kept in ``OUT.work`` meanwhile: the same call goes on from there.

    Args:
        request: what is asked for.
        progress: is told of every measurement.

    Raises:
        InputError: the budget is not for this model, no way keeps to it, the copy has no place, or bundles cannot be
            compared (see `open_candidates` and `open_reference`).
        BundleError: a bundle is damaged.
        TargetError: this machine does not run the only bundle.
        NumericalError: an engine gave NaN or infinity.
    """
    request = replace(request, out=request.out.absolute())
    candidates = open_candidates(request.bundles, request.settings)
    request.budget.check_model(candidates[0].bundle.manifest.model.name)
    reference = open_reference(request.reference_bundle, candidates, request.settings)
    others = (*request.bundles, request.reference_bundle)
    check_new_place(others, request.out)
    work = request.out.with_name(f"{request.out.name}.work")
    with exclusive(request.out):
        check_new_place(others, request.out)
        found = _measure(request, candidates, reference, work, StageLog(progress or Silent()))
        chosen = _choose(request, found)
        (copied,) = (each for each in candidates if each.path == chosen.bundle)
        manifest = copied.bundle.manifest
        tuning = Tuning(
            request, manifest.model.name, manifest.precision, copied.target, reference.target, tuple(found), chosen
        )
        write_copy(copied.bundle, request.out, tuning)
        shutil.rmtree(work, ignore_errors=True)
    return tuning


def _measure(
    request: TuneRequest, candidates: Sequence[Candidate], reference: Candidate, work: Path, stages: StageLog
) -> list[Measurement]:
    settings, way = request.settings, way_of_settings(request.settings)
    folder = work / _identity(request, candidates, reference)
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Measurement] = []
    with opened_bench(
        reference.path,
        settings,
        budget=request.budget,
        rounds=request.rounds,
        folder=folder,
        stages=stages,
    ) as bench:
        for each in candidates:
            space = Space.around(way, abilities_of(each.bundle), MeasuredSchedules(each, settings, stages))
            kept = KeptMeasurements(folder / each.digest, each.path, partial(bench.measure, each))
            found += search(space, kept, request.budget, settings.samples)
    return found


def _choose(request: TuneRequest, found: Sequence[Measurement]) -> Measurement:
    """The fastest of all bundles' ways within the budget."""
    chosen = fastest_within(on_all(found, request.settings.samples), request.budget)
    if chosen is None:
        nearest = min(found, key=lambda each: request.budget.harm(each.quality))
        whose = f" of {nearest.bundle}" if len(request.bundles) > 1 else ""
        raise InputError(
            f"no way to draw keeps to --budget {request.budget}; the nearest is {nearest.way}{whose} with "
            f"{request.budget.text(nearest.quality)}",
            hint="give a larger budget, or another --reference",
        )
    return chosen


def _identity(request: TuneRequest, candidates: Sequence[Candidate], reference: Candidate) -> str:
    """Sixteen hexadecimal digits that change with whatever a measurement depends on, its way and pictures aside."""
    digests = [reference.digest, [each.digest for each in candidates]]
    everything = [digests, asdict(request.settings), str(request.budget.measure), request.rounds]
    return sha256(json.dumps(everything).encode()).hexdigest()[:16]


def write_copy(bundle: Bundle, out: Path, tuning: Tuning) -> None:
    """Put a copy of a bundle with a preset at `out`, whole or not at all. To be used while `exclusive(out)` is held.

    Raises:
        BundleError: a file of the bundle has changed.
    """
    bundle.check_digests()
    contents: dict[str, bytes | CachedFile | BundleFile] = {
        name: BundleFile(bundle, name) for name in bundle.manifest.files
    }
    contents[TUNING_REPORT] = json_bytes(tuning.to_json())
    write_bundle(out, replace(bundle.manifest, files=file_entries(contents), preset=tuning.preset), contents)
