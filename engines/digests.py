"""SHA-256 of files, remembered in the user's cache folder so that gigabytes are not read again at every start.

A remembered digest counts only while the file's size, inode, modification and change time are what they were. As in
git's index, it is not remembered for a file changed in the last seconds, since a second change within one tick of the
clock would leave the same times.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path

from sdc.engines.environment import cache_folder

log = logging.getLogger(__name__)

_SETTLED_SECONDS = 2.0
"""Coarser than any file system's clock in use (FAT: 2 s)."""


def file_sha256(path: Path, *, remembered: bool = True) -> str:
    """The hexadecimal SHA-256 of a file.

    Args:
        path: the file.
        remembered: take the digest of an unchanged file from the cache; else the file is read.
    """
    path = path.resolve()
    before = _fingerprint(path)
    record = _record_path(path)
    if remembered and record is not None:
        digest = _recall(record, before)
        if digest is not None:
            return digest
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settled = time.time() - max(before[2], before[3]) / 1e9 > _SETTLED_SECONDS
    if record is not None and settled and _fingerprint(path) == before:
        _remember(record, before, digest)
    return digest


def _fingerprint(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _record_path(path: Path) -> Path | None:
    try:
        folder = cache_folder()
    except RuntimeError:  # a user without a home folder
        return None
    return folder / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"


def _recall(record: Path, fingerprint: list[int]) -> str | None:
    try:
        stored = json.loads(record.read_bytes())
        if stored["fingerprint"] == fingerprint and isinstance(stored["sha256"], str):
            return str(stored["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _remember(record: Path, fingerprint: list[int], digest: str) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=record.parent)
        with os.fdopen(handle, "w") as file:
            json.dump({"fingerprint": fingerprint, "sha256": digest}, file)
        Path(temporary).replace(record)
    except OSError as error:
        log.debug("the digest is not remembered: %s", error)
