"""Turns, rounds and what is kept of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import peers.bench
import pytest
from peers.bench import Bench, Limits, relative_error
from peers.environments import DONE, SetUpError, python_of, run_logged
from peers.foreign_load import Snapshot
from peers.inputs import check_room
from peers.protocol import Job
from peers.residents import Residents
from peers.sides import ENVIRONMENTS, SIDES, Side
from peers.store import Measurement, Store, open_store
from peers.worker import SideError

GIB = 1 << 30
THREE = list(SIDES[:3])
KEYS = [side.key for side in THREE]


class FakeWorker:
    """Answers at once; `log` has what it was asked."""

    clock: ClassVar[list[float]] = [0.0]
    slow = False
    pid = None
    started = 100.0
    load_seconds = 1.5

    def __init__(self, side: Side, log: list[str], *, peak: int = GIB) -> None:
        self.side, self.log, self.peak = side, log, peak
        log.append(f"open {side.key}")

    def ask(self, *, do: str, **question: Any) -> dict[str, Any]:
        self.clock[0] += 0.5 * question.get("calls", 0) * (60 if self.slow else 1)
        if do == "save":
            np.save(question["path"], np.array([1.0, 2.0]))
            return {"saved": True}
        self.log.append(f"{self.side.key} {question['calls']}×{question['steps']}")
        seconds = [0.5] * question["calls"]
        return {"seconds": seconds, "processor_seconds": 1.0, "first_step": [104.0, 105.0], "extra": {}}

    def peak_bytes(self) -> int:
        return self.peak

    def close(self) -> None:
        self.log.append(f"close {self.side.key}")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """An idle machine and a made clock: tested is who is asked when. test_peer_workers.py has real processes."""
    monkeypatch.setattr(peers.bench, "wait_for_quiet", lambda *_, **__: 0.0)
    monkeypatch.setattr(peers.bench, "time", SimpleNamespace(monotonic=lambda: FakeWorker.clock[0]))
    monkeypatch.setattr(peers.bench, "snapshot", lambda _: Snapshot(0.0, 0.0, 0.0))
    monkeypatch.setattr(peers.bench, "foreign_cores", lambda *_: 0.0)
    store = Store(tmp_path / "figures.json", {"architecture": "tiny", "steps": 20})
    limits = Limits(turn_seconds=2.0, calls=3, warm_up=2, memory_bytes=18 * GIB)
    job = Job("unet", 2, "checkpoint", str(tmp_path), "inputs.npz")
    return Bench(store, {}, job, {}, 20, tmp_path, limits)


def with_workers(bench: Bench, monkeypatch: pytest.MonkeyPatch, **peaks: int) -> list[str]:
    log: list[str] = []

    def start(side: Side, component: str, threads: int, **options: object) -> FakeWorker:
        return FakeWorker(side, log, peak=peaks.get(side.key.replace("-", "_"), GIB))

    monkeypatch.setattr(bench, "open", start)
    return log


def test_another_side_begins_each_round(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with_workers(bench, monkeypatch)
    bench.measure_component("unet", 2, THREE, 3)
    one, two, three = KEYS
    assert [each.side for each in bench.store.measurements] == [one, two, three, two, three, one, three, one, two]


def test_turn_is_long_enough_and_warmed_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    log = with_workers(bench, monkeypatch)
    bench.measure_component("unet", 2, THREE[:1], 2)
    key = KEYS[0]
    warm, turn = [f"{key} 1×20", f"{key} 2×20"], f"{key} 4×20"  # 4 calls of 0.5 s are the 2 s of a turn
    assert log == [f"open {key}", *warm, turn, warm[0], turn, f"close {key}"]


def test_slow_call_is_a_turn(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "slow", True)
    log = with_workers(bench, monkeypatch)
    bench.measure_component("unet", 2, THREE[:1], 2)
    assert log[1:-1] == [f"{KEYS[0]} 1×20"] * 3  # one warms up, two rounds


def test_very_slow_side_takes_part_in_few_rounds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with_workers(bench, monkeypatch)
    bench.measure_component("unet", 2, [THREE[0], replace(THREE[1], most_rounds=2)], 3)
    assert sorted((each.side, each.round) for each in bench.store.measurements) == sorted(
        [(KEYS[0], 0), (KEYS[0], 1), (KEYS[0], 2), (KEYS[1], 0), (KEYS[1], 1)]
    )


def test_picture_is_warmed_up_with_one_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    log = with_workers(bench, monkeypatch)
    bench.measure_component("picture", 2, THREE[:1], 2)
    assert log[1:-1] == [f"{KEYS[0]} 1×1", f"{KEYS[0]} 1×20", f"{KEYS[0]} 1×20"]


def test_start_is_to_the_first_step_of_a_fresh_process(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    log = with_workers(bench, monkeypatch)
    bench.measure_component("start", 2, THREE[:1], 2)
    assert [each.seconds for each in bench.store.measurements] == [[4.0], [4.0]]
    assert log == [f"open {KEYS[0]}", f"{KEYS[0]} 1×1", f"close {KEYS[0]}"] * 2


def test_later_call_measures_only_what_is_missing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with_workers(bench, monkeypatch)
    bench.measure_component("unet", 2, THREE, 1)
    bench.store.measurements.pop(1)
    bench.store.save()
    bench.store = open_store(bench.store.path, bench.store.settings)
    log = with_workers(bench, monkeypatch)
    bench.measure_component("unet", 2, THREE, 1)
    assert {line.split()[-1] for line in log if line.startswith("open")} == {KEYS[1]}
    assert len(bench.store.measurements) == 3


def test_failure_ends_one_sides_rounds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def start(side: Side, component: str, threads: int, **options: object) -> FakeWorker:
        if side.key == KEYS[1]:
            log.append("tried")
            raise SideError("out of something")
        return FakeWorker(side, log)

    monkeypatch.setattr(bench, "open", start)
    bench.measure_component("unet", 2, THREE, 2)
    assert log.count("tried") == 1
    assert bench.store.failure(KEYS[1], "unet") == "out of something"
    assert bench.store.failure(KEYS[1], "vae_decoder") is None
    assert [each.side for each in bench.store.measurements].count(KEYS[2]) == 2


def test_disturbed_turn_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter((0.9, 0.04, 0.5, 0.3, 0.7))
    monkeypatch.setattr(peers.bench, "foreign_cores", lambda *_: next(loads))
    with_workers(bench, monkeypatch)
    bench.measure_component("unet", 2, THREE[:1], 2)
    first, second = bench.store.measurements
    assert (first.foreign, first.disturbed) == (0.04, False)
    assert (second.foreign, second.disturbed) == (0.3, True)  # the quietest of three


def test_processes_stay_up_as_far_as_memory_goes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (key.replace("-", "_") for key in KEYS)
    log = with_workers(bench, monkeypatch, **{first: 6 * GIB, second: 8 * GIB, third: 9 * GIB})
    bench.measure_component("unet", 2, THREE, 2)
    opened = [line.split()[1] for line in log if line.startswith("open")]
    assert opened.count(KEYS[0]) == 1
    assert opened.count(KEYS[1]) == 2
    assert opened.count(KEYS[2]) == 2


def test_residents_leave_room_for_the_largest_of_the_others() -> None:
    log: list[str] = []
    residents: Residents[Any] = Residents(10 * GIB)
    residents.take("small", lambda: FakeWorker(SIDES[0], log, peak=GIB))
    residents.release("small", ["small", "unknown"])  # 1 + 8 GiB
    assert not residents.take("small", lambda: pytest.fail("it was ended"))[1]
    residents.take("large", lambda: FakeWorker(SIDES[1], log, peak=3 * GIB))
    residents.release("large", ["small", "large", "unknown"])  # 1 + 3 + 8 GiB
    assert log[-1] == f"close {SIDES[1].key}"
    residents.release("small", ["small", "large"])  # 1 + 3 GiB
    assert not residents.take("small", lambda: pytest.fail("it was ended"))[1]


def test_error_is_relative_to_the_reference(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with_workers(bench, monkeypatch)
    reference = next(side for side in SIDES if side.key == "torch-fp32")
    (bench.folder / "results").mkdir()
    np.save(bench.result_path(reference, "unet"), np.array([1.0, 2.5]))
    bench.measure_component("unet", 2, THREE[:1], 1)
    bench.note_errors("unet", [THREE[0], SIDES[-1]])
    assert bench.store.errors[KEYS[0]]["unet"] == pytest.approx(0.5 / np.hypot(1, 2.5))
    assert bench.store.errors[SIDES[-1].key]["unet"] is None
    assert relative_error(np.array([2.0]), np.array([1.0])) == 1.0


def test_figures_of_other_settings_are_refused(bench: Bench) -> None:
    bench.store.fail("torch-bf16", "all", "pip failed")
    again = open_store(bench.store.path, bench.store.settings)
    assert again == bench.store
    assert again.failure("torch-bf16", "picture") == "pip failed"
    with pytest.raises(ValueError, match="sd15"):
        open_store(bench.store.path, {"architecture": "sd15", "steps": 20})


def test_measurement_survives_the_file(bench: Bench) -> None:
    taken = Measurement("a", "unet", 2, 0, [1.0, 4.0, 2.0], 3.0, 0.01, False, GIB, 5.0, flops=7.0)
    bench.store.measurements.append(taken)
    bench.store.save()
    found = open_store(bench.store.path, bench.store.settings).find("a", "unet", 2, 0)
    assert found == taken
    assert found.median == 2.0
    assert bench.store.find("a", "unet", 1, 0) is None
    assert bench.store.find("a", "unet", 2, 1) is None


def test_environment_is_made_once_and_again_for_other_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], log: Path, variables: dict[str, str]) -> None:
        commands.append(command)
        (tmp_path / "sdcpp").mkdir(exist_ok=True)

    for _ in range(2):
        assert python_of("sdcpp", tmp_path, run=run) == tmp_path / "sdcpp" / "bin" / "python"
    assert len(commands) == 2
    assert "--no-binary" in commands[1]
    changed = replace(ENVIRONMENTS["sdcpp"], variables={"CMAKE_ARGS": "-DX=1"})
    monkeypatch.setitem(ENVIRONMENTS, "sdcpp", changed)
    python_of("sdcpp", tmp_path, run=run)
    assert len(commands) == 4


def test_room_on_the_disk_is_looked_at_first(tmp_path: Path) -> None:
    check_room(tmp_path / "new", 1)
    with pytest.raises(SetUpError, match="expected 1099511627776 GiB"):
        check_room(tmp_path, 1 << 70)


def test_environment_that_failed_is_not_done(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    with pytest.raises(SetUpError, match=r"status 3: .*no such wheel"):
        run_logged(["sh", "-c", "echo no such wheel; exit 3"], log, {})

    def run(command: list[str], log: Path, variables: dict[str, str]) -> None:
        raise SetUpError("pip")

    with pytest.raises(SetUpError):
        python_of("openvino", tmp_path, run=run)
    assert not (tmp_path / "openvino" / DONE).exists()
