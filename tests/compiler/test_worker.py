"""The worker returns results and errors, and neither outlives its parent nor takes it along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from sdc.compiler.workshop.worker import Worker
from sdc.engines.errors import ExportError, InputError


def double(value: int) -> int:
    return 2 * value


def process_id() -> int:
    return os.getpid()


KEPT: list[bytearray] = []


def fill_memory_below_a_small_block(count: int) -> None:
    """Blocks that glibc takes from its heap, which ends with one that stays: by itself it gives nothing back then."""
    blocks = [bytearray(b"x") * 50_000 for _ in range(count // 50_000)]
    KEPT.append(bytearray(50_000))
    del blocks


def refuse(message: str) -> None:
    raise InputError(message, hint="do something else")


class UnportableError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def raise_unportable() -> None:
    raise UnportableError(3, 5)


def count(total: int, report: Callable[[int, int], None]) -> str:
    for done in range(total):
        report(done + 1, total)
    return "counted"


def fill_memory(size_bytes: int) -> int:
    return int(np.ones(size_bytes, np.uint8).sum())


def print_and_die(text: str, number: int) -> None:
    os.write(1, text.encode())
    os.kill(os.getpid(), number)


def leave(code: int) -> None:
    os._exit(code)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with Worker(log_path=tmp_path / "worker.log") as worker:
        yield worker


def test_calls_run_in_one_other_process(worker: Worker) -> None:
    assert worker.call(double, 21).value == 42
    first = worker.call(process_id).value
    assert first != os.getpid()
    assert worker.call(process_id).value == first
    worker.close()
    assert not psutil.pid_exists(first)
    assert worker.call(process_id).value != first


def test_errors_come_back_whole_and_the_worker_goes_on(worker: Worker) -> None:
    with pytest.raises(InputError) as caught:
        worker.call(refuse, "expected this, found that")
    assert caught.value.message == "expected this, found that"
    assert caught.value.hint == "do something else"
    assert str(caught.value) == "expected this, found that; do something else"
    assert "in refuse" in "".join(caught.value.__notes__)
    with pytest.raises(RuntimeError, match="UnportableError: 3 and 5"):
        worker.call(raise_unportable)
    assert worker.call(double, 4).value == 8


def test_progress_is_reported_while_it_runs(worker: Worker) -> None:
    seen: list[tuple[int, int]] = []
    outcome = worker.call(count, 3, on_report=lambda done, total: seen.append((done, total)))
    assert outcome.value == "counted"
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark cannot be reset elsewhere")
def test_memory_is_that_of_the_call(worker: Worker) -> None:
    small = worker.call(double, 1).peak_memory_bytes
    large = worker.call(fill_memory, 200_000_000).peak_memory_bytes
    assert 200_000_000 <= large - small < 260_000_000
    assert worker.call(double, 1).peak_memory_bytes < small + 60_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark cannot be reset elsewhere")
def test_what_a_call_has_freed_is_not_held_in_the_next(worker: Worker) -> None:
    small = worker.call(double, 1).peak_memory_bytes
    worker.call(fill_memory_below_a_small_block, 200_000_000)
    assert worker.call(double, 1).peak_memory_bytes < small + 60_000_000


def test_a_killed_worker_is_an_error_that_tells_its_last_words(worker: Worker) -> None:
    with pytest.raises(ExportError, match=r"print_and_die was killed; it said last: out of luck.*memory"):
        worker.call(print_and_die, "out of luck\n", signal.SIGKILL)
    with pytest.raises(ExportError, match=r"print_and_die was killed"):
        worker.call(partial(print_and_die, "out of luck\n"), signal.SIGKILL)
    assert worker.call(double, 5).value == 10
    with pytest.raises(ExportError, match="leave ended with code 7"):
        worker.call(leave, 7)


def test_what_libraries_print_stays_out_of_standard_output(tmp_path: Path) -> None:
    program = (
        "import os\n"
        "from pathlib import Path\n"
        "from sdc.compiler.workshop.worker import Worker\n"
        "if __name__ == '__main__':\n"
        "    for log in (None, Path(r'%s')):\n"
        "        with Worker(log_path=log) as worker:\n"
        "            worker.call(os.system, 'echo noise')\n"
        "    print('result')\n"
    ) % (tmp_path / "log")
    (tmp_path / "program.py").write_text(program)
    result = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=True)
    assert result.stdout == "result\n"
    assert result.stderr == "noise\n"
    assert (tmp_path / "log").read_text() == "noise\n"


def test_the_worker_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import os, time\n"
        "from sdc.compiler.workshop.worker import Worker\n"
        "if __name__ == '__main__':\n"
        "    with Worker(log_path=None) as worker:\n"
        "        print(worker.call(os.getpid).value, flush=True)\n"
        "        worker.call(time.sleep, 600)\n"
    )
    (tmp_path / "program.py").write_text(program)
    with subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker_id = int(parent.stdout.readline())
        assert psutil.pid_exists(worker_id)
        parent.kill()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(worker_id) and psutil.Process(worker_id).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.05)
