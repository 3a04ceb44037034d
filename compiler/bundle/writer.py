"""Writes bundles: beside their place, digested, and renamed into it when they are complete."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdc.compiler.workshop.cache import Entry
from sdc.compiler.workshop.staging import staged_folder
from sdc.engines.bundle import Bundle, open_bundle
from sdc.engines.errors import BundleError, ExportError, InputError
from sdc.engines.manifest import MANIFEST_NAME, FileEntry, Manifest

log = logging.getLogger(__name__)


_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class CachedFile:
    """A file of a bundle that lies in the cache, under its name in `entry`."""

    entry: Entry
    name: str


@dataclass(frozen=True)
class BundleFile:
    """A file of another bundle, under its name there."""

    bundle: Bundle
    name: str


Contents = Mapping[str, bytes | CachedFile | BundleFile]
"""All files of a bundle but the manifest, by their paths in it."""


def file_entries(contents: Contents) -> dict[str, FileEntry]:
    """Digest and size of every file, sorted by path."""

    def describe(content: bytes | CachedFile | BundleFile) -> FileEntry:
        if isinstance(content, bytes):
            return FileEntry(hashlib.sha256(content).hexdigest(), len(content))
        if isinstance(content, BundleFile):
            return content.bundle.manifest.files[content.name]
        return content.entry.files[content.name]

    return {name: describe(contents[name]) for name in sorted(contents)}


def write_bundle(out: Path, manifest: Manifest, contents: Contents) -> None:
    """Put a bundle at `out`; if anything goes wrong, `out` stays as it was. To be used while `exclusive(out)` is held.

    Raises:
        BundleError: a file of another bundle has changed.
        ExportError: a file in the cache has changed.
    """
    with staged_folder(out, durable=True) as folder:
        for name, content in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                _copy(content, path)
        (folder / MANIFEST_NAME).write_bytes(json_bytes(manifest.to_json()))
        open_bundle(folder, verify=False)  # what we cannot read ourselves is not published


def _copy(file: CachedFile | BundleFile, path: Path) -> None:
    """Copy a file, checking it. It is no link: who edits a bundle shall not change other bundles."""
    if isinstance(file, BundleFile):
        source, expected = file.bundle.path / file.name, file.bundle.manifest.files[file.name]
    else:
        source, expected = file.entry.folder / file.name, file.entry.files[file.name]
    digest = hashlib.sha256()
    with source.open("rb") as original, path.open("wb") as copy:
        while chunk := original.read(_CHUNK_BYTES):
            digest.update(chunk)
            copy.write(chunk)
    if digest.hexdigest() == expected.sha256:
        return
    if isinstance(file, BundleFile):
        raise BundleError(f"{source} has changed since the export", hint="export that bundle again")
    raise ExportError(
        f"{source} has changed since it was put into the cache",
        hint=f"remove the folder {file.entry.folder} and export again",
    )


def check_new_place(bundles: Sequence[Path], out: Path) -> None:
    """Pass if a bundle made out of others may be written at `out`: nothing is there, or an empty folder.

    Raises:
        InputError: something is there, or it is inside of another bundle.
    """
    for bundle in bundles:
        if out.resolve().is_relative_to(bundle.resolve()):
            raise InputError(f"{out} is inside the bundle {bundle}", hint="choose another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists", hint="choose another --out, or move it away")


def check_output(out: Path) -> None:
    """Pass if a bundle may be written at `out`: nothing is there, or an empty folder, or a bundle.

    Raises:
        InputError: something else is there.
    """
    hint = "choose another --out, or move it away"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no folder", hint=hint)
    if out.exists() and not (out / MANIFEST_NAME).is_file() and any(out.iterdir()):
        raise InputError(f"{out} exists and is no bundle (it has no {MANIFEST_NAME})", hint=hint)


def is_up_to_date(out: Path, manifest: Manifest) -> bool:
    """Whether the bundle that `manifest` describes is at `out` already, every file of it whole."""
    try:
        if (out / MANIFEST_NAME).read_bytes() != json_bytes(manifest.to_json()):
            return False
        open_bundle(out).check_digests()
    except (OSError, BundleError):
        return False
    return True


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON as it is written into bundles: equal values give equal bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def compact_json_bytes(value: Mapping[str, Any]) -> bytes:
    """As `json_bytes`, in one line: for long lists of numbers."""
    return (json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n").encode()
