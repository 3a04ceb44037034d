"""The command `sdc`: finds the subcommand's module, and turns every error into one message and an exit code."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

from sdc.engines.environment import check_environment
from sdc.engines.errors import InputError, SdcError

COMMANDS = (
    *("export", "lora", "tune", "run", "plan", "eval", "compare"),
    *("optimize", "distill", "compress", "inspect", "doctor"),
)
"""Each is a module of this package with `SUMMARY`, `add_arguments(parser)` and `run(args) -> int`.

A module is imported only for its own command: `sdc run` works where the compiler's dependencies are not installed.
"""

UNEXPECTED_ERROR = 70
"""Exit code of a defect of sdc. Source: ``EX_SOFTWARE`` of BSD's sysexits(3)."""
INTERRUPTED, TERMINATED, CLOSED_PIPE = 128 + 2, 128 + 15, 128 + 13
"""Exit codes after SIGINT, SIGTERM and SIGPIPE, as a shell reports them."""

_OF_THE_PATH = frozenset({errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS})
"""What an operating system says of a path that whoever runs sdc chose, or may not use."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code and raises nothing."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments, verbose="--verbose" in arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has enough; the interpreter shall not complain when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def _run(arguments: list[str], *, verbose: bool) -> int:
    try:
        with _unwinding_at_a_signal():
            args = _parse(arguments)
            _start_logging(verbose)
            check_environment()
            try:
                code: int = args.run(args)
            except ModuleNotFoundError as error:
                _refuse_missing_package(error, args.command)
            return code
    except SystemExit as end:  # argparse has said why
        return end.code if isinstance(end.code, int) else 0
    except SdcError as error:
        return _complain(str(error), error.exit_code, with_traceback=verbose)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except _Terminated:
        return _complain("terminated", TERMINATED)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None or error.errno not in _OF_THE_PATH:
            return _complain_of_defect(error, verbose)
        what = f"{error.filename} cannot be used: {error.strerror}"
        return _complain(what, InputError.exit_code, with_traceback=verbose)
    except Exception as error:
        return _complain_of_defect(error, verbose)


def _parse(arguments: list[str]) -> argparse.Namespace:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(prog="sdc", description="An ahead-of-time compiler for Stable Diffusion.")
    parser.add_argument("--version", action="version", version=f"sdc {version('sdc')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    wanted = next((each for each in arguments if not each.startswith("-")), None)
    for name in COMMANDS if wanted not in COMMANDS else (wanted,):
        module = _import_command(name)
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(command)
        command.add_argument("--verbose", action="store_true", help="show logs, and tracebacks of errors")
        command.set_defaults(run=module.run, command=name)
    return parser.parse_args(arguments)


def _import_command(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        _refuse_missing_package(error, name)


def _refuse_missing_package(error: ModuleNotFoundError, command: str) -> NoReturn:
    if (error.name or "").startswith("sdc."):
        raise error
    raise InputError(
        f"`sdc {command}` needs the package {error.name}, which is not installed", hint="pip install 'sdc[compile]'"
    ) from error


def _start_logging(verbose: bool) -> None:
    logging.captureWarnings(True)
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True)
        return
    logging.basicConfig(level=logging.WARNING, format="sdc: %(message)s", force=True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)  # libraries' advice to their developers


def _complain(message: str, code: int, *, with_traceback: bool = False) -> int:
    if with_traceback:
        traceback.print_exc()
    print(f"sdc: {message}", file=sys.stderr)
    return code


def _complain_of_defect(error: Exception, verbose: bool) -> int:
    what = f"unexpected {type(error).__name__}: {error}"
    advice = "" if verbose else "; run with --verbose for the traceback"
    return _complain(what + advice, UNEXPECTED_ERROR, with_traceback=verbose)


class _Terminated(BaseException):
    """SIGTERM arrived; raised where the main thread is, so that half-written files are removed."""


@contextmanager
def _unwinding_at_a_signal() -> Iterator[None]:
    """SIGINT and SIGTERM raise in the main thread, and what fails after one is reported as that signal.

    It may arrive inside a library's callback, where every exception becomes one of the library's own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[type[BaseException]] = []

    def unwind(number: int, _: object) -> None:
        arrived.append(_Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        raise arrived[-1]

    heeded = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, unwind) for number in heeded}
    try:
        yield
    except Exception as error:
        if arrived:
            raise arrived[-1] from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
