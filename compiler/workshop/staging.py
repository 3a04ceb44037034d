"""Folders that appear whole or not at all: filled under a hidden name beside their place, then renamed."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sdc.engines.errors import InputError

log = logging.getLogger(__name__)


@contextmanager
def exclusive(path: Path, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the right to replace `path`; the right ends with the process, however it ends.

    What earlier holders left half done is removed, and a replacement that they did not finish is undone.

    Args:
        path: the file or folder; its parent is created.
        on_wait: called once if another process holds the right, before waiting for it.

    Raises:
        InputError: the folder takes no files at all, as those of /proc.
        OSError: another reason why nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # there FileLock would wait for ever
    except FileNotFoundError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}", hint="choose another place") from error
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        _recover(path)
        yield
    finally:
        # Removed while held: whoever opened the old file meanwhile sees that it has no name any more and opens anew.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


@contextmanager
def staged_folder(final: Path, *, durable: bool) -> Iterator[Path]:
    """An empty hidden folder that takes the place of `final` when the block ends well, and vanishes otherwise.

    To be used while `exclusive(final)` is held.

    Args:
        final: the folder's place; a folder that stands there is replaced.
        durable: write everything through to the disk before the renaming, so that not even a power failure leaves a
            folder with missing contents.
    """
    staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
    try:
        # mkdtemp makes a private folder; the umask shall decide, as for any other folder.
        staging.chmod(0o777 & ~_umask())
        yield staging
        if durable:
            _flush_tree(staging)
        _replace(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if durable:
        _flush(final.parent)


def _replace(staging: Path, final: Path) -> None:
    """Put `staging` at `final`; killed between the two renamings, `_recover` brings the old folder back."""
    previous = _previous(final)
    if final.exists():
        final.rename(previous)
    staging.rename(final)
    shutil.rmtree(previous, ignore_errors=True)


def _recover(final: Path) -> None:
    previous = _previous(final)
    if previous.exists() and not final.exists():
        log.info("bringing back %s, whose replacement was interrupted", final)
        previous.rename(final)
    for leftover in (previous, *final.parent.glob(f".{final.name}.partial-*")):
        if leftover.exists():
            log.info("removing %s, left by an interrupted run", leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def _previous(final: Path) -> Path:
    return final.parent / f".{final.name}.previous"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush(Path(parent, name))
        _flush(Path(parent))


def _flush(path: Path) -> None:
    """Write a file or a folder's list of names through to the disk; folders cannot be opened on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
