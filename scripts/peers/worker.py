"""A measured process from outside: asked over a pipe, and ended when it takes too long or too much memory."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import psutil

from peers.environments import SetUpError, last_lines
from peers.protocol import Job
from peers.sides import OWN, Side

SCRIPTS = Path(__file__).resolve().parent.parent
LOOK_SECONDS = 0.5
"""Between looks at a busy process's memory."""


class SideError(Exception):
    """A side failed; the text is for its row."""


def command_of(side: Side, python: Path, verb: str, job: Job) -> list[str]:
    """What starts a process of a side."""
    return [str(python), "-m", f"peers.{side.module}", verb, json.dumps(asdict(job))]


def variables_of(side: Side, threads: int, caches: Path) -> dict[str, str]:
    """Its environment variables: no path of sdc for a peer, and nothing from the network."""
    kept = os.environ if side.environment == OWN else {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    path = os.pathsep.join(filter(None, (str(SCRIPTS), kept.get("PYTHONPATH"))))
    return {
        **kept,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        **side.variables,
    }


class Worker:
    """A process that serves one side and one job.

    Attributes:
        side: that it runs.
        started: `time.monotonic()` before its start.
        load_seconds: that loading took, as it says.
    """

    def __init__(self, side: Side, python: Path, job: Job, *, log: Path, limit_bytes: int, timeout: float) -> None:
        """Start it and let it load.

        Raises:
            SideError: it did not load.
        """
        self.side = side
        self._limits = (limit_bytes, timeout)
        self._log = log
        self._log_file: IO[bytes] = log.open("wb")
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            command_of(side, python, "serve", job),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            env=variables_of(side, job.threads, Path(job.made)),
            start_new_session=True,
        )
        try:
            self.load_seconds: float = self.ask(do="load")["seconds"]
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(self, **question: Any) -> dict[str, Any]:
        """Ask, and wait for the answer.

        Raises:
            SideError: it ended, answered an error, took too long or too much memory.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise SideError(f"the process has ended: {last_lines(self._log)}") from error
        self._wait()
        line = self._process.stdout.readline()
        if not line:
            raise SideError(f"the process ended with status {self._process.wait()}: {last_lines(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer

    def _wait(self) -> None:
        limit_bytes, timeout = self._limits
        end = time.monotonic() + timeout
        while not select.select([self._process.stdout], [], [], LOOK_SECONDS)[0]:
            check_memory(self._process, limit_bytes)
            if time.monotonic() > end:
                stop(self._process)
                raise SideError(f"no answer after {timeout:.0f} s")

    def peak_bytes(self) -> int:
        """Most memory that was resident at a time (VmHWM), files that are mapped included."""
        return peak_from_status(Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8"))

    def close(self) -> None:
        """End it; may be called twice."""
        stop(self._process)
        self._log_file.close()


def prepare_side(side: Side, python: Path, job: Job, *, log: Path, limit_bytes: int, timeout: float) -> None:
    """Let a side make its files.

    Raises:
        SetUpError: it could not.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(
            command_of(side, python, "prepare", job),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=variables_of(side, job.threads, Path(job.made)),
            start_new_session=True,
        )
        end = time.monotonic() + timeout
        try:
            while process.poll() is None:
                check_memory(process, limit_bytes)
                if time.monotonic() > end:
                    raise SideError(f"not done after {timeout:.0f} s")
                time.sleep(LOOK_SECONDS)
        except SideError as error:
            raise SetUpError(str(error)) from error
        finally:
            stop(process)
    if process.returncode:
        raise SetUpError(f"status {process.returncode}: {last_lines(log)}")


def check_memory(process: subprocess.Popen[bytes], limit_bytes: int) -> None:
    """End a process that takes more memory than it may.

    Raises:
        SideError: it took more.
    """
    try:
        taken = psutil.Process(process.pid).memory_info()
    except psutil.NoSuchProcess:
        return
    if taken.rss - taken.shared > limit_bytes:
        stop(process)
        raise SideError(f"it took more than {limit_bytes / 2**30:.0f} GiB of memory")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started."""
    if process.stdin is not None:
        process.stdin.close()
    if process.poll() is None:
        try:
            process.wait(timeout=5 if process.stdin is not None else 0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def peak_from_status(status: str) -> int:
    """VmHWM of the text of /proc/PID/status, in bytes."""
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
