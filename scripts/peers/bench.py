"""Rounds: every side in turn, the machine watched, what was measured kept."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from peers.environments import SetUpError
from peers.foreign_load import foreign_cores, snapshot, wait_for_quiet
from peers.protocol import PICTURE, Job
from peers.residents import Residents
from peers.sides import REFERENCE, Side, find_side
from peers.store import Measurement, Store
from peers.worker import SideError, Worker

START = "start"
MOST_CALLS = 50


@dataclass(frozen=True)
class Limits:
    """How carefully is measured.

    Attributes:
        foreign: processors that others may keep busy during a turn.
        tries: of a turn.
        patience_seconds: for others to become quiet before a try.
        turn_seconds: that the calls of a turn take together, at least.
        calls: of a turn, at least, where it is no picture.
        warm_up: calls that are not counted, after a process was opened and called once.
        slow_seconds: a call of more makes up a turn alone, and is warmed up by one call.
        memory_bytes: for all processes that are up together; one alone may take as much.
        answer_seconds: that one answer may take.
    """

    foreign: float = 0.1
    tries: int = 3
    patience_seconds: float = 120.0
    turn_seconds: float = 2.0
    calls: int = 3
    warm_up: int = 2
    slow_seconds: float = 20.0
    memory_bytes: int = 18 << 30
    answer_seconds: float = 2400.0


@dataclass
class Bench:
    """All that a turn needs.

    Attributes:
        store: of the figures.
        pythons: interpreters by environment.
        job: what every side gets; component, threads and options are filled in.
        options: of sides, by key.
        steps: of a picture.
        folder: for logs and results.
        limits: how carefully is measured.
        slow: sides and components whose single calls are turns.
        saved: those whose results were kept; what an earlier run left may be of other engines.
    """

    store: Store
    pythons: dict[str, Path]
    job: Job
    options: Mapping[str, dict[str, Any]]
    steps: int
    folder: Path
    limits: Limits
    slow: set[tuple[str, str]] = field(default_factory=set)
    saved: set[tuple[str, str]] = field(default_factory=set)

    def job_of(self, side: Side, component: str, threads: int, **options: object) -> Job:
        """The job of a side's process."""
        component = PICTURE if component == START else component
        return replace(
            self.job,
            component=component,
            threads=threads,
            options={**self.options.get(side.key, side.options), **options},
        )

    def open(self, side: Side, component: str, threads: int, **options: object) -> Worker:
        """A process that has loaded.

        Raises:
            SideError: it has not.
        """
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        return Worker(
            side,
            self.pythons[side.environment],
            self.job_of(side, component, threads, **options),
            log=self.folder / "logs" / f"{side.key}-{component}-{threads}.log",
            limit_bytes=self.limits.memory_bytes,
            timeout=self.limits.answer_seconds,
        )

    def result_path(self, side: Side, component: str) -> Path:
        """Where what a side computed is kept."""
        return self.folder / "results" / f"{side.key}-{component}.npy"

    def measure_component(self, component: str, threads: int, sides: list[Side], rounds: int) -> None:
        """All rounds of a component; what is known is not measured again."""
        residents: Residents[Worker] = Residents(self.limits.memory_bytes)
        try:
            for round_ in range(rounds):
                order = sides[round_ % len(sides) :] + sides[: round_ % len(sides)]  # none is always the first
                for side in order:
                    done = self.store.find(side.key, component, threads, round_) is not None
                    enough = side.most_rounds is not None and round_ >= side.most_rounds
                    if done or enough or self.store.failure(side.key, component):
                        continue
                    self.take_turn(side, component, threads, round_, residents, [each.key for each in sides])
        finally:
            residents.close()

    def take_turn(
        self, side: Side, component: str, threads: int, round_: int, residents: Residents[Worker], sides: list[str]
    ) -> None:
        """One side in one round; a failure ends the side's rounds, not the others'."""
        try:
            if component == START:
                self.keep(self.time_start(side, threads, round_))
                return
            worker, fresh = residents.take(side.key, lambda: self.open(side, component, threads))
            calls = self.warm_up(worker, side, component, fresh=fresh)
            self.keep(self.time_calls(worker, component, threads, round_, calls))
            residents.release(side.key, [key for key in sides if not self.store.failure(key, component)])
        except SideError as error:
            residents.drop(side.key)
            print(f"{side.key}, {component}: failed: {error}", flush=True)
            self.store.fail(side.key, component, str(error))

    def warm_up(self, worker: Worker, side: Side, component: str, *, fresh: bool) -> int:
        """Calls that do not count; how many calls a turn has then. What the first gave is kept, for its error."""
        if component == PICTURE or (side.key, component) in self.slow:
            if fresh:
                worker.ask(do="run", calls=1, steps=1)
            return 1
        seconds = self.seconds_of_calls(worker, 1)
        self.keep_result(worker, component)
        if seconds > self.limits.slow_seconds:
            self.slow.add((side.key, component))
            return 1
        if fresh:
            seconds = self.seconds_of_calls(worker, self.limits.warm_up) / self.limits.warm_up
        return max(self.limits.calls, min(MOST_CALLS, math.ceil(self.limits.turn_seconds / seconds)))

    def seconds_of_calls(self, worker: Worker, calls: int) -> float:
        """On the clock: a side may do more in a call than it tells the time of."""
        begin = time.monotonic()
        worker.ask(do="run", calls=calls, steps=self.steps)
        return time.monotonic() - begin

    def keep_result(self, worker: Worker, component: str) -> None:
        """Keep what the last call gave, once in a run."""
        if (worker.side.key, component) not in self.saved:
            self.save_result(worker, self.result_path(worker.side, component))
            self.saved.add((worker.side.key, component))

    def save_result(self, worker: Worker, path: Path) -> None:
        """Keep what the last call gave, if the side gives it out."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished.npy")
        if worker.ask(do="save", path=str(unfinished))["saved"]:
            unfinished.replace(path)

    def time_calls(self, worker: Worker, component: str, threads: int, round_: int, calls: int) -> Measurement:
        """The turn: tried again while others are busy; the quietest try counts."""
        tries = []
        for _ in range(self.limits.tries):
            wait_for_quiet(self.limits.foreign, patience_seconds=self.limits.patience_seconds)
            before = snapshot(worker.pid)
            answer = worker.ask(do="run", calls=calls, steps=self.steps)
            foreign = foreign_cores(before, snapshot(worker.pid))
            tries.append(self.measurement(worker, component, threads, round_, answer, foreign))
            if not tries[-1].disturbed:
                break
        if component == PICTURE:
            self.keep_result(worker, component)
        return min(tries, key=lambda each: each.foreign)

    def time_start(self, side: Side, threads: int, round_: int) -> Measurement:
        """From the start of a process to its first denoising step, with the files that the round before has read."""
        tries = []
        for _ in range(self.limits.tries):
            wait_for_quiet(self.limits.foreign, patience_seconds=self.limits.patience_seconds)
            before = snapshot(None)
            worker = self.open(side, START, threads)
            try:
                answer = worker.ask(do="run", calls=1, steps=1)
                foreign = foreign_cores(before, snapshot(worker.pid))
                if answer["first_step"] is None:
                    raise SideError("it does not tell when its first step began")
                answer["seconds"] = [answer["first_step"][0] - worker.started]
                tries.append(self.measurement(worker, START, threads, round_, answer, foreign))
            finally:
                worker.close()
            if not tries[-1].disturbed:
                break
        return min(tries, key=lambda each: each.foreign)

    def measurement(
        self, worker: Worker, component: str, threads: int, round_: int, answer: dict[str, Any], foreign: float
    ) -> Measurement:
        """What an answer says."""
        return Measurement(
            side=worker.side.key,
            component=component,
            threads=threads,
            round=round_,
            seconds=answer["seconds"],
            processor_seconds=answer["processor_seconds"],
            foreign=round(foreign, 4),
            disturbed=foreign > self.limits.foreign,
            peak_bytes=worker.peak_bytes(),
            load_seconds=worker.load_seconds,
            flops=answer["extra"].get("flops"),
        )

    def keep(self, measured: Measurement) -> None:
        """Store it, and show progress."""
        self.store.measurements.append(measured)
        self.store.save()
        print(
            f"{measured.component}, {measured.threads} threads, round {measured.round + 1}: {measured.side} "
            f"{measured.median:.4g} s, peak {measured.peak_bytes / 2**30:.2f} GiB, others {measured.foreign:.2f} cores"
            f"{' (disturbed)' if measured.disturbed else ''}",
            flush=True,
        )

    def make_reference(self, component: str, threads: int) -> None:
        """What float32 torch computes, and in how many operations."""
        side = find_side(REFERENCE)
        path = self.result_path(side, component)
        if component == START or (path.exists() and (component == PICTURE or component in self.store.flops)):
            return
        worker = self.open(side, component, threads, count_flops=component != PICTURE)
        try:
            answer = worker.ask(do="run", calls=1, steps=self.steps)
            self.save_result(worker, path)
            if component != PICTURE:
                self.store.flops[component] = answer["extra"]["flops"]
                self.store.save()
        finally:
            worker.close()

    def note_errors(self, component: str, sides: list[Side]) -> None:
        """How far each side's result is from the reference's."""
        reference = self.result_path(find_side(REFERENCE), component)
        if component == START or not reference.exists():
            return
        exact = np.load(reference)
        for side in sides:
            path = self.result_path(side, component)
            error = relative_error(np.load(path), exact) if path.exists() else None
            self.store.errors.setdefault(side.key, {})[component] = error
        self.store.save()


def relative_error(values: np.ndarray, exact: np.ndarray) -> float:
    """Norm of the difference by the norm of what is exact."""
    return float(np.linalg.norm(np.float64(values) - exact) / np.linalg.norm(np.float64(exact)))


def attempt(action: Callable[[], object], store: Store, side: Side, what: str) -> bool:
    """Do something that a side needs; note its failure. True if it was done."""
    try:
        action()
    except SetUpError as error:
        print(f"{side.key}: {what} failed: {error}", file=sys.stderr, flush=True)
        store.fail(side.key, "all", f"{what}: {error}")
        return False
    return True
