"""A child process for heavy stages: what it allocated goes back to the system, and its crash is an error, not ours."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from sdc.compiler.workshop.memory import PeakMemory
from sdc.engines.errors import ExportError
from sdc.engines.freed_memory import give_memory_back

LOG_TAIL_LINES = 5

_REPORT, _RESULT, _ERROR = "report", "result", "error"


@dataclass(frozen=True)
class Outcome:
    """What a call in a worker gave.

    Attributes:
        value: what the function returned.
        peak_memory_bytes: most memory that the worker held during the call.
    """

    value: Any
    peak_memory_bytes: int


class Worker:
    """A process that runs one function after another; started at the first call, ended by `close`.

    It dies with its parent. What libraries print in it goes to a log file, never to the terminal. Scripts that use it
    need the usual ``if __name__ == "__main__":``, since the process is spawned.

    Args:
        log_path: receives what the worker prints; None leaves it on standard error.
    """

    def __init__(self, *, log_path: Path | None) -> None:
        self._log_path = log_path
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def call(
        self, function: Callable[..., Any], *arguments: Any, on_report: Callable[..., None] | None = None
    ) -> Outcome:
        """Run a module-level function in the worker.

        Args:
            function: can be found by its name in its module, as pickle does.
            arguments: can be pickled, as the result.
            on_report: called here with what the function gives to its last argument, ``report(...)``; without it the
                function gets no such argument.

        Raises:
            ExportError: the process died; any error that the function raised is raised here, too.
        """
        connection = self._connection or self._start()
        try:
            connection.send((function, arguments, on_report is not None))
            kind, *content = connection.recv()
            while kind == _REPORT:
                assert on_report is not None
                on_report(*content)
                kind, *content = connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise self._death(_name_of(function)) from error
        if kind == _ERROR:
            raise content[0]
        return Outcome(*content)

    def kill(self) -> None:
        """End the process at once, from any thread; a call that runs raises ExportError."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ValueError):  # it was closed meanwhile
                process.kill()

    def close(self) -> None:
        """End the process at once, whatever it does; may be called twice, and `call` starts another one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._log_path, logging.getLogger().level), name="sdc-worker", daemon=True
        )
        self._process.start()
        theirs.close()
        return self._connection

    def _death(self, function: str) -> ExportError:
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode
        tail = "" if self._log_path is None else _tail(self._log_path)
        self.close()
        said = f"; it said last: {tail}" if tail else ""
        if code == -signal.SIGKILL:
            return ExportError(
                f"the process that ran {function} was killed{said}",
                hint="probably the machine ran out of memory: close other programs, or use a machine with more",
            )
        return ExportError(f"the process that ran {function} ended with code {code}{said}", hint="please report this")


def _name_of(function: Callable[..., Any]) -> str:
    """Of a function, or of the one in a `functools.partial`."""
    return str(getattr(getattr(function, "func", function), "__name__", function))


def _tail(path: Path) -> str:
    with contextlib.suppress(OSError):
        return " / ".join(path.read_text(errors="replace").strip().splitlines()[-LOG_TAIL_LINES:])
    return ""


def _serve(connection: Connection, log_path: Path | None, log_level: int) -> None:
    """Answer calls until the parent closes the connection or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if log_path is not None:
        descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 2)
    os.dup2(2, 1)  # nothing but the parent writes to standard output
    logging.basicConfig(level=log_level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    while True:
        try:
            function, arguments, reports = connection.recv()
        except EOFError:
            return
        if reports:
            arguments = (*arguments, lambda *content: connection.send((_REPORT, *content)))
        with PeakMemory() as memory:
            try:
                kind, value = _RESULT, function(*arguments)
            except Exception as error:
                kind, value = _ERROR, _portable(error)
        try:
            connection.send((kind, value, memory.peak_bytes))
        except BrokenPipeError:
            return
        del function, arguments, value
        gc.collect()
        give_memory_back()  # the next stage shall not add to what this one has freed


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or, where it cannot travel between processes, one that says the same."""
    text = "".join(traceback.format_exception(error))
    try:
        copy = multiprocessing.reduction.ForkingPickler.loads(multiprocessing.reduction.ForkingPickler.dumps(error))
        faithful = type(copy) is type(error)
    except Exception:
        faithful = False
    portable = error if faithful else RuntimeError(f"{type(error).__name__}: {error}")
    portable.add_note(f"In the worker process:\n{text}")
    return portable
