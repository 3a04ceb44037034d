"""Safetensors files are opened, checked and digested here, and nowhere else."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdc.engines.errors import InputError

log = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
"""Files of these names are Python pickles, which run code when they are opened."""


def refuse_pickle(path: Path) -> None:
    """Raise if the file's name says that it is a pickle.

    Raises:
        InputError: it is.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(
            f"{path} is a pickle, which can run any code when it is opened",
            hint="convert it to safetensors in a place that you trust it in: "
            "safetensors.torch.save_file({k: v.contiguous() for k, v in torch.load(FILE, weights_only=True)"
            "['state_dict'].items()}, 'model.safetensors')",
        )


def read_tensors(path: Path, *, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Map the tensors of a file whose names begin with one of ``prefixes``; bytes are read when they are used.

    Raises:
        InputError: the file is missing, truncated or not in safetensors format.
    """
    refuse_pickle(path)
    if not path.is_file():
        raise InputError(f"weights file {path} not found", hint="check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file: {error}", hint="fetch it again"
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The free text pairs of a file that `read_tensors` accepts."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def digest_files(paths: Iterable[Path]) -> list[str]:
    """The SHA-256 of each file's content, in the given order; a file that has not changed is read once a process."""
    return [_digest_version(path.resolve(), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]


@functools.lru_cache(maxsize=256)
def _digest_version(path: Path, *version: int) -> str:
    """``version`` is there for the cache: a file of another time or size is another one."""
    log.debug("digesting %s, version %s", path, version)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
