"""`sdc distill`: train what an export can fold in."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdc.compiler.cli.training_arguments import (
    add_training_arguments,
    grid_prompts,
    open_pictures,
    set_threads,
    with_arguments,
)
from sdc.engines.errors import InputError

SUMMARY = "train a LoRA with which a model draws in a few steps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    kinds = parser.add_subparsers(title="what to distil", metavar="KIND", required=True)
    lora = kinds.add_parser("lcm-lora", help="latent consistency: 2 to 8 steps of the sampler lcm, without guidance")
    lora.add_argument("--model", required=True, help='"tiny", "sd15", an id on the hub, a diffusers folder or a file')
    lora.add_argument("--out", type=Path, required=True, metavar="FILE", help="the LoRA, a .safetensors file")
    lora.add_argument("--rank", type=int, help="of every layer's update (64; 4 for tiny)")
    lora.add_argument("--steps", type=int, help="optimiser steps (1000; 1600 for tiny)")
    lora.add_argument("--batch", type=int, help="pictures a step (12; 32 for tiny)")
    lora.add_argument("--learning-rate", type=float, help="the largest (1e-4; 2e-3 for tiny)")
    lora.add_argument(
        "--guidance",
        metavar="LOW:HIGH",
        help="range of the teacher's guidance scale, which the pictures will have without any (6:9; 1.8:2.5 for tiny)",
    )
    add_training_arguments(lora, data_required=True)
    lora.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Distil; progress goes to standard error, the summary to standard output."""
    from sdc.compiler.distill.distill import distill_lora
    from sdc.compiler.distill.settings import settings_for
    from sdc.compiler.distill.training_loop import Reporting
    from sdc.compiler.load import load_checkpoint
    from sdc.compiler.plain_json import check_writable

    if args.out.suffix != ".safetensors":
        raise InputError(f"{args.out} is no name of a LoRA", hint="end it in .safetensors")
    check_writable(args.out)
    settings = with_arguments(settings_for(args.model), args)
    set_threads(args.threads)
    checkpoint = load_checkpoint(args.model)
    pictures = open_pictures(args, checkpoint, settings.seed)
    reporting = Reporting(
        args.work or args.out.with_suffix(".work"),
        grid_prompts(args.model, pictures),
        checkpoint_every=args.checkpoint_every,
        grid_every=args.grid_every,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    done = distill_lora(checkpoint, pictures, settings, out=args.out, reporting=reporting)
    print(
        f"{done.out} is written: rank {settings.rank}, {100 * done.trained_share:.2f} % of the UNet's parameters "
        f"trained, {settings.steps} steps in {done.minutes:.1f} minutes, loss {done.last_loss:.5f}\n"
        f"next: sdc export --model {args.model} --lora {done.out}, then sdc run --sampler lcm --steps 4 --guidance 1"
    )
    return 0
