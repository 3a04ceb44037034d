"""Results of stages, kept by the content of what they were made from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdc.compiler.workshop.staging import exclusive, staged_folder
from sdc.engines.digests import file_sha256
from sdc.engines.manifest import FileEntry

log = logging.getLogger(__name__)

ENTRY_NAME = "entry.json"
RECENT_SECONDS = 3600.0
"""Entries used so lately are never evicted: another export may be reading them."""


@dataclass(frozen=True)
class Entry:
    """The stored result of a stage.

    Attributes:
        folder: holds the files.
        result: what the stage said, as JSON values.
        files: digest and size of every file, by path relative to `folder`.
    """

    folder: Path
    result: Any
    files: Mapping[str, FileEntry]

    def damage(self) -> str | None:
        """What is wrong with the files; None if every one is as it was written.

        They are read, except those that were read before and have kept their times: see `file_sha256`.
        """
        for name, expected in self.files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != expected.bytes:
                return f"{name} is missing or was cut"
            if file_sha256(path) != expected.sha256:
                return f"{name} was changed"
        return None


class StageCache:
    """Entries below one folder; several processes may use it at once.

    An entry appears whole, by a renaming. It is not forced to the disk: after a power failure a damaged entry is
    found by its digests, and made again.

    Args:
        root: the folder; created when the first entry is stored.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, stage: str, key: str) -> Entry | None:
        """The entry of a stage, if there is one. Its files are not looked at: see `Entry.damage`."""
        folder = self._folder(stage, key)
        try:
            stored = json.loads((folder / ENTRY_NAME).read_text(encoding="utf-8"))
            files = {name: FileEntry(**entry) for name, entry in stored["files"].items()}
            entry = Entry(folder, stored["result"], files)
            os.utime(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return entry

    def produce(self, stage: str, key: str, make: Callable[[Path], Any]) -> tuple[Entry, bool]:
        """The entry of a stage, made by `make` unless a sound one is stored; and whether one was.

        Two processes that want the same entry do not make it twice: the second waits for the first.

        Args:
            stage: name of the stage.
            key: digest of all that the result depends on: see `digest_of`.
            make: fills the folder it is given and returns the stage's result as JSON values.
        """
        folder = self._folder(stage, key)
        with exclusive(folder, on_wait=lambda: log.info("%s is being made by another process; waiting", stage)):
            entry = self.find(stage, key)
            damage = entry.damage() if entry is not None else None
            if entry is not None and damage is None:
                return entry, True
            if damage is not None:
                log.warning("the cached %s is damaged (%s) and is made again", stage, damage)
            with staged_folder(folder, durable=False) as staging:
                result = make(staging)
                stored = {"result": result, "files": {name: asdict(each) for name, each in _digests(staging).items()}}
                (staging / ENTRY_NAME).write_text(json.dumps(stored, indent=1), encoding="utf-8")
            made = self.find(stage, key)
            assert made is not None
            return made, False

    def evict(self, limit_bytes: int, *, now_seconds: float) -> int:
        """Remove the entries that were not used for longest until the rest fits; returns the bytes removed.

        Args:
            limit_bytes: what may stay.
            now_seconds: the present time; entries of the last hour stay in any case.
        """
        entries = sorted(self.root.glob(f"*/*/{ENTRY_NAME}"), key=lambda path: path.parent.stat().st_mtime)
        sizes = {
            path.parent: sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
            for path in entries
        }
        excess = sum(sizes.values()) - limit_bytes
        removed = 0
        for folder, size_bytes in sizes.items():
            if removed >= excess or folder.stat().st_mtime > now_seconds - RECENT_SECONDS:
                break
            log.info("removing %s from the cache (%d MB)", folder.parent.name, size_bytes // 2**20)
            shutil.rmtree(folder, ignore_errors=True)
            removed += size_bytes
        return removed

    def _folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key


def digest_of(value: Any) -> str:
    """A digest of JSON values that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_sources(modules: Iterable[str]) -> str:
    """A digest of the source code of modules and packages (with all below them), without importing them."""
    digest = hashlib.sha256()
    for name in modules:
        for path in _sources(name):
            digest.update(f"{name} {path.name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _sources(module: str) -> list[Path]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no source for {module}")
    origin = Path(spec.origin)
    return sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]


def versions_of(distributions: Iterable[str]) -> dict[str, str]:
    """Installed versions by name of the distribution; "" where it is not installed."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return {name: version(name) for name in distributions}


def _digests(folder: Path) -> dict[str, FileEntry]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileEntry(file_sha256(path, remembered=False), path.stat().st_size)
        for path in files
    }
