"""The argument ``--memory-limit``, and its answer for `sdc run`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sdc.compiler.byte_sizes import parse_bytes
from sdc.engines.errors import InputError

if TYPE_CHECKING:
    from sdc.compiler.memory.limit import Fit
    from sdc.engines.generation import Generation


FOR_PICTURES = (
    "what the process may take, as 1.5GiB: if it would take more, pictures are denoised or decoded one at a time, or "
    "decoded in tiles (default: no limit)"
)


def add_memory_limit(parser: argparse.ArgumentParser, what: str = FOR_PICTURES) -> None:
    """Declare the argument; `what` is its help."""
    parser.add_argument("--memory-limit", type=_size, metavar="SIZE", help=what)


def fit_generation(bundle: Path, target: str, generation: Generation, limit_bytes: int) -> Fit:
    """What has to be done to draw a generation below a limit; worked out in a process of its own, which takes memory.

    Raises:
        InputError: some steps are not guided: what an engine for two sizes takes is not predicted.
        SdcError: as for `fit_pictures`.
    """
    from sdc.compiler.workshop.worker import Worker

    if generation.guidance_steps is not None:
        raise InputError(
            "a memory limit was given, and guidance at some steps, for which memory is not predicted",
            hint="leave one of them out",
        )
    with Worker(log_path=None) as worker:
        fit: Fit = worker.call(_fit, bundle, target, generation, limit_bytes).value
    return fit


def _fit(bundle: Path, target: str, generation: Generation, limit_bytes: int) -> Fit:
    from sdc.compiler.memory.engine_plan import Request
    from sdc.compiler.memory.fit import fit_pictures
    from sdc.engines.bundle import open_bundle

    request = Request(
        height_px=generation.height_px,
        width_px=generation.width_px,
        pictures=len(generation),
        guidance_scale=generation.guidance_scale,
        deepcache=generation.full_steps is not None,
    )
    fit, _ = fit_pictures(open_bundle(bundle, verify=False), target, request, limit_bytes)
    return fit


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
