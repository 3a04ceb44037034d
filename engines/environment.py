"""The only place where the runtime reads environment variables."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sdc.engines.errors import InputError


def cache_folder() -> Path:
    """The folder for what can be made again: ``$SDC_CACHE``, else ``sdc`` in the user's cache folder. Not created."""
    chosen = os.environ.get("SDC_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "sdc"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdc"


def kernels_wanted() -> bool:
    """Whether the CPU kernels of `sdc.engines.kernels` may be built and used: ``$SDC_KERNELS`` does not say "0"."""
    return "0" not in _kernels()


def kernels_may_round_to_bytes() -> bool:
    """Whether CPU kernels may compute in 8 bits where a graph is quantised: ``$SDC_KERNELS`` does not say "bf16"."""
    return "bf16" not in _kernels()


def kernels_may_use_amx() -> bool:
    """Whether CPU kernels may use AMX: ``$SDC_KERNELS`` does not say "avx512"."""
    return "avx512" not in _kernels()


def kernels_beyond_attention() -> bool:
    """Whether CPU kernels may be used for more than attention: ``$SDC_KERNELS`` does not say "attention"."""
    return "attention" not in _kernels()


def check_environment() -> None:
    """Refuse variables that mean nothing, before work is done under them.

    Raises:
        InputError: ``$SDC_KERNELS`` has a word that is unknown; as the functions that read it.
    """
    _kernels()


_KERNEL_WORDS = ("0", "1", "attention", "avx512", "bf16")


def _kernels() -> list[str]:
    """The words of ``$SDC_KERNELS``, which commas separate.

    Raises:
        InputError: one of them means nothing.
    """
    words = [word.strip() for word in os.environ.get("SDC_KERNELS", "").split(",")]
    if unknown := [word for word in words if word and word not in _KERNEL_WORDS]:
        hint = f"use {', '.join(_KERNEL_WORDS[:-1])} or {_KERNEL_WORDS[-1]}, or several with commas between them"
        raise InputError(f"$SDC_KERNELS says {unknown[0]!r}, which means nothing", hint=hint)
    return words
