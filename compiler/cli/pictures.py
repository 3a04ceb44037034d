"""Arguments of the commands that draw pictures to measure them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Literal

from sdc.engines.deepcache import CacheSchedule
from sdc.engines.preset import AUTO

if TYPE_CHECKING:
    from sdc.compiler.evaluate.settings import Settings


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how pictures are drawn."""
    parser.add_argument("--sampler", default="ddim", help="ddim, euler, dpmpp-2m or lcm (ddim)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of each picture (20)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale of the pictures (3)")
    parser.add_argument("--threads", type=int, help="CPU threads of the engines (all)")


def add_shortcut_arguments(parser: argparse.ArgumentParser, *, auto: bool = False) -> None:
    """Declare what makes steps cheaper.

    Args:
        parser: of a command.
        auto: whether DeepCache may be as it was measured; then it is None if it is not asked for.
    """
    measured = "; auto as `sdc tune` measured it" if auto else ""
    parser.add_argument(
        "--guidance-steps", type=step_range, metavar="FIRST:END",
        help="guide only from step FIRST up to, not including, END, from 0; others need half of the UNet's work "
        "(default: guide all)",
    )  # fmt: skip
    parser.add_argument(
        "--deepcache", metavar="N",
        type=cache_schedule_or_auto if auto else cache_schedule, default=None if auto else 1,
        help="run the whole UNet at every N-th step only, or at the steps 0,A,B,…, and a shallow one between; for a "
        f"bundle exported with --deepcache (default: 1, at each{measured})",
    )  # fmt: skip
    parser.add_argument(
        "--deepcache-center", type=int, metavar="STEP", help="run it more often around this step (default: evenly)"
    )


def step_range(text: str) -> tuple[int, int]:
    """Steps written as "FIRST:END"."""
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected FIRST:END, as in 2:12, found {text!r}")
    return int(first), int(end)


def cache_schedule(text: str) -> CacheSchedule:
    """An interval of DeepCache, or its full steps: "3", or "0,3,7,12"."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected a number, or steps as in 0,3,7,12, found {text!r}")
    return int(text) if len(parts) == 1 else tuple(map(int, parts))


def cache_schedule_or_auto(text: str) -> CacheSchedule | Literal["auto"]:
    """As `cache_schedule`, or "auto"."""
    return AUTO if text == AUTO else cache_schedule(text)


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
