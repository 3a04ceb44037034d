"""Measured processes: the protocol, their limits, and what others do meanwhile."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import peers.worker
import pytest
from peers.foreign_load import Snapshot, busy_seconds, foreign_cores, snapshot
from peers.protocol import Job, Measured, made_folder, repeated, serve
from peers.sides import SIDES, Side
from peers.worker import SideError, Worker, check_memory, peak_from_status, variables_of

FAKE = Path(__file__).with_name("fake_side.py")
Open = Callable[..., Worker]


def job_of(component: str = "unet", threads: int = 3) -> Job:
    return Job(component, threads, "checkpoint", "made", "inputs.npz")


@pytest.fixture
def open_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Open]:
    def command(side: Side, python: Path, verb: str, job: Job) -> list[str]:
        return [str(python), str(FAKE), verb, json.dumps(asdict(job))]

    monkeypatch.setattr(peers.worker, "command_of", command)
    monkeypatch.setattr(peers.worker, "LOOK_SECONDS", 0.02)
    opened: list[Worker] = []

    def start(component: str = "unet", *, limit_bytes: int = 1 << 30, timeout: float = 30.0) -> Worker:
        log = tmp_path / "log"
        worker = Worker(
            SIDES[0], Path(sys.executable), job_of(component), log=log, limit_bytes=limit_bytes, timeout=timeout
        )
        opened.append(worker)
        return worker

    yield start
    for worker in opened:
        worker.close()


def answers_to(*questions: dict[str, Any], work: Callable[[int, int], Measured]) -> list[dict[str, Any]]:
    asked, answered = io.StringIO("".join(json.dumps(each) + "\n" for each in questions)), io.StringIO()
    serve(job_of(), lambda _: work, asked, answered)
    return [json.loads(line) for line in answered.getvalue().splitlines()]


def test_serving_goes_on_after_an_error(tmp_path: Path) -> None:
    def work(calls: int, steps: int) -> Measured:
        if calls == 5:
            raise RuntimeError("too many")
        return Measured([0.25] * calls, np.arange(steps), (1.0, 2.0))

    run, path = {"do": "run", "steps": 4}, tmp_path / "result.npy"
    answers = answers_to(
        *({"do": "load"}, {**run, "calls": 5}, {**run, "calls": 2}, {"do": "save", "path": str(path)}, {"do": "sing"}),
        work=work,
    )
    assert answers[1] == {"error": "RuntimeError: too many"}
    assert answers[2]["seconds"] == [0.25, 0.25]
    assert answers[2]["first_step"] == [1.0, 2.0]
    assert answers[3] == {"saved": True}
    assert "sing" in answers[4]["error"]
    assert np.load(path).tolist() == [0, 1, 2, 3]


def test_what_a_side_does_not_give_out_is_not_saved(tmp_path: Path) -> None:
    questions = ({"do": "load"}, {"do": "run", "calls": 1, "steps": 1}, {"do": "save", "path": str(tmp_path / "x.npy")})
    assert answers_to(*questions, work=lambda *_: Measured([1.0]))[-1] == {"saved": False}


def test_calls_are_timed_one_by_one() -> None:
    waits = iter((0.0, 0.03))

    def run(feeds: Any) -> np.ndarray:
        time.sleep(next(waits))
        return np.array([feeds])

    feeds: Any = 7
    measured = repeated(run, feeds)(2, 20)
    assert measured.seconds[0] < 0.03 <= measured.seconds[1]
    assert measured.result is not None
    assert measured.result[0] == 7


def test_unfinished_folder_is_made_again(tmp_path: Path) -> None:
    job = Job("unet", 1, "", str(tmp_path), "")
    made: list[Path] = []

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        made_folder(job, "graph", fail)
    for _ in range(2):
        assert made_folder(job, "graph", made.append) == tmp_path / "graph"
    assert len(made) == 1
    assert not (tmp_path / "graph" / "half").exists()


def test_worker_answers_whatever_is_printed(open_worker: Open, tmp_path: Path) -> None:
    worker = open_worker()
    assert worker.ask(do="run", calls=2, steps=9)["seconds"] == [3.0, 3.0]
    assert worker.ask(do="save", path=str(tmp_path / "result.npy"))["saved"]
    assert np.load(tmp_path / "result.npy").tolist() == [9]
    assert worker.peak_bytes() > 5 << 20
    log = (tmp_path / "log").read_text()
    assert "greets" in log
    assert "noise below Python" in log


@pytest.mark.parametrize(
    ("component", "limits", "reason"),
    [
        ("dies", {}, "status 7"),
        ("sleeps", {"timeout": 1.5}, "no answer after"),
        ("swells", {"limit_bytes": 150 << 20}, "more than"),
    ],
)
def test_worker_that_fails_is_ended(open_worker: Open, component: str, limits: dict[str, Any], reason: str) -> None:
    worker = open_worker(component, **limits)
    with pytest.raises(SideError, match=reason):
        worker.ask(do="run", calls=1, steps=1)
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def text_of(status: Path) -> str:
    """Of a process's status; one that is gone has ended, as a zombie has."""
    try:
        return status.read_text()
    except OSError:
        return "(zombie)"


def wait_until(happened: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end, otherwise
        time.sleep(0.02)


def test_busy_worker_ends_with_the_script(tmp_path: Path) -> None:
    questions = ({"do": "load"}, {"do": "run", "calls": 1, "steps": 1})
    code = (
        "import subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, *sys.argv[2:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "worker.stdin.write(sys.argv[1].encode())\n"
        "worker.stdin.flush()\n"
        "worker.stdout.readline()\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    asked = "".join(json.dumps(each) + "\n" for each in questions)
    command = [sys.executable, "-c", code, asked, str(FAKE), "serve", json.dumps(asdict(job_of("sleeps")))]
    environment = {**os.environ, "PYTHONPATH": str(peers.worker.SCRIPTS)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as script:
        assert script.stdout is not None
        status = Path(f"/proc/{int(script.stdout.readline())}/status")
        wait_until(lambda: "(sleeping)" in text_of(status), "it does not sleep")
        script.kill()
    wait_until(lambda: "(zombie)" in text_of(status), "it goes on")


def test_worker_that_does_not_load_says_why(open_worker: Open) -> None:
    with pytest.raises(SideError, match="ValueError: no such network"):
        open_worker("broken")


def test_peers_do_not_see_sdc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/sdc")
    by_key = {side.key: side for side in SIDES}
    assert "/of/sdc" not in variables_of(by_key["torch-bf16"], 2, Path("made"))["PYTHONPATH"]
    ours = variables_of(by_key["sdc-int8-plain"], 2, Path("made"))
    assert ours["PYTHONPATH"].endswith(":/of/sdc")
    assert ours["SDC_KERNELS"] == "0"
    assert ours["OMP_NUM_THREADS"] == "2"


def test_peak_is_read_in_bytes() -> None:
    assert peak_from_status("Name:\tx\nVmPeak:\t  99 kB\nVmHWM:\t   12 kB\nVmRSS:\t 5 kB\n") == 12 * 1024


def test_check_memory_of_an_ended_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    check_memory(process, 1)


def test_busy_time_leaves_idle_out_and_counts_guests_once() -> None:
    stat = "cpu  100 20 3 4000 500 6 7 80 9 10\ncpu0 1 1 1 1\n"
    assert busy_seconds(stat, 100) == pytest.approx((100 + 20 + 3 + 6 + 7 + 80) / 100)


def test_foreign_load_is_what_is_not_our_own() -> None:
    before = Snapshot(at=10.0, busy=100.0, own=5.0)
    assert foreign_cores(before, Snapshot(at=14.0, busy=107.0, own=10.0)) == pytest.approx(0.5)
    assert foreign_cores(before, Snapshot(at=14.0, busy=104.99, own=10.0)) == 0.0  # clocks of different steps


def test_time_of_the_measured_process_is_our_own(open_worker: Open) -> None:
    worker = open_worker("burns")
    before = snapshot(worker.pid)
    worker.ask(do="run", calls=1, steps=1)
    after = snapshot(worker.pid)
    assert after.own - before.own >= 0.15
    assert after.busy - before.busy >= 0.15
