"""Reports as JSON files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sdc.engines.errors import InputError


def finite_json(value: Any) -> Any:
    """The same value with lists for tuples and null for numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_writable(*paths: Path | None) -> None:
    """Raise now, rather than after minutes of work, if a file could not be written because its folder is missing.

    Raises:
        InputError: there is no such folder, or a folder has the file's name.
    """
    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InputError(f"{path} cannot be written", hint="name a file in a folder that exists")


def write_json(path: Path | None, value: Any) -> None:
    """Write a report, if there is a path to write it to.

    Raises:
        InputError: the file cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
