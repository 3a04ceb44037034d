"""Arguments of the commands that draw pictures to measure them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdc.compiler.evaluate.settings import Settings


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how pictures are drawn."""
    parser.add_argument("--sampler", default="ddim", help="ddim, euler, dpmpp-2m or lcm (ddim)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of each picture (20)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale of the pictures (3)")
    parser.add_argument("--threads", type=int, help="CPU threads of the engines (all)")


def settings_from_arguments(args: argparse.Namespace, *, samples: int, batch: int | None = None) -> Settings:
    """The settings of an evaluation; `args` has the seed and the target as well."""
    from sdc.compiler.evaluate.settings import Settings

    return Settings(
        samples=samples,
        seed=args.seed,
        sampler=args.sampler,
        steps=args.steps,
        guidance_scale=args.guidance,
        batch=batch,
        target=args.target,
        threads=args.threads,
    )
