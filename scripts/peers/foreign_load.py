"""How busy other programs keep the machine while one process is measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

IDLE_FIELDS = (3, 4)
"""Of a line of /proc/stat: idle, and waiting for a disk. Source: proc(5)."""

GUEST_FIELDS = 8
"""From here on the times of guests are counted a second time."""


@dataclass(frozen=True)
class Snapshot:
    """Processor time since the machine and the processes were started.

    Attributes:
        at: `time.monotonic()`.
        busy: seconds of all processors, of everything, and what a hypervisor took away.
        own: seconds of the measured process, of its children and of this one.
    """

    at: float
    busy: float
    own: float


def foreign_cores(before: Snapshot, after: Snapshot) -> float:
    """Processors that others kept busy in between, 0.0 to the number of processors."""
    return max(0.0, (after.busy - before.busy) - (after.own - before.own)) / (after.at - before.at)


def busy_seconds(stat: str, ticks_per_second: int) -> float:
    """From the text of /proc/stat."""
    fields = [int(field) for field in stat.splitlines()[0].split()[1:]]
    return (
        sum(value for index, value in enumerate(fields[:GUEST_FIELDS]) if index not in IDLE_FIELDS) / ticks_per_second
    )


def snapshot(pid: int | None) -> Snapshot:
    """Now; `pid` is the measured process."""
    own = process_seconds(psutil.Process())
    if pid is not None:
        process = psutil.Process(pid)
        own += process_seconds(process, ended_children=True)
        own += sum(process_seconds(each) for each in process.children(recursive=True))
    busy = busy_seconds(Path("/proc/stat").read_text(encoding="ascii"), os.sysconf("SC_CLK_TCK"))
    return Snapshot(time.monotonic(), busy, own)


def process_seconds(process: psutil.Process, *, ended_children: bool = False) -> float:
    """Processor time of one process, with that of children that have ended or without; 0 if it has ended itself."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system + (times.children_user + times.children_system if ended_children else 0.0)


def wait_for_quiet(limit: float, *, patience_seconds: float, look_seconds: float = 1.0) -> float:
    """Wait until others keep no more than `limit` processors busy, or patience ends; what they last kept busy."""
    end = time.monotonic() + patience_seconds
    while True:
        before = snapshot(None)
        time.sleep(look_seconds)
        foreign = foreign_cores(before, snapshot(None))
        if foreign <= limit or time.monotonic() > end:
            return foreign
