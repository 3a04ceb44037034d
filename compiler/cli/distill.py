"""`sdc distill`: train what an export can fold in."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sdc.engines.errors import InputError

if TYPE_CHECKING:
    from sdc.compiler.distill.pictures import Pictures
    from sdc.compiler.distill.settings import DistillSettings
    from sdc.compiler.load import Checkpoint

SUMMARY = "train a LoRA with which a model draws in a few steps"

GRID_PROMPTS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    kinds = parser.add_subparsers(title="what to distil", metavar="KIND", required=True)
    lora = kinds.add_parser("lcm-lora", help="latent consistency: 2 to 8 steps of the sampler lcm, without guidance")
    lora.add_argument("--model", required=True, help='"tiny", "sd15", an id on the hub, a diffusers folder or a file')
    lora.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="of tiny: the gzipped files of Fashion-MNIST; else pictures and a metadata.jsonl of file_name and text",
    )
    lora.add_argument("--out", type=Path, required=True, metavar="FILE", help="the LoRA, a .safetensors file")
    lora.add_argument("--rank", type=int, help="of every layer's update (64; 4 for tiny)")
    lora.add_argument("--steps", type=int, help="optimiser steps (1000; 700 for tiny)")
    lora.add_argument("--batch", type=int, help="pictures a step (12; 32 for tiny)")
    lora.add_argument("--learning-rate", type=float, help="the largest (1e-4; 2e-3 for tiny)")
    lora.add_argument(
        "--guidance",
        metavar="LOW:HIGH",
        help="range of the teacher's guidance scale, which the pictures will have without any (6:9; 1.6:2.2 for tiny)",
    )
    lora.add_argument("--seed", type=int, help="of the first weights, batches and noise (0)")
    lora.add_argument("--size", metavar="HEIGHTxWIDTH", help="of a folder's pictures, in pixels (the model's own)")
    lora.add_argument("--precision", choices=("fp32", "bf16"), help="bf16: autocast of the networks (fp32)")
    lora.add_argument(
        "--gradient-checkpointing", action="store_true", default=None, help="less memory, a third more time"
    )
    lora.add_argument("--work", type=Path, metavar="DIR", help="checkpoint, losses, latents and grids (OUT.work)")
    lora.add_argument("--checkpoint-every", type=int, default=100, metavar="N", help="steps between checkpoints (100)")
    lora.add_argument("--grid-every", type=int, default=500, metavar="N", help="steps between picture grids (500)")
    lora.add_argument("--threads", type=int, help="CPU threads (all)")
    lora.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Distil; progress goes to standard error, the summary to standard output."""
    import torch

    from sdc.compiler.distill.distill import Reporting, distill_lora
    from sdc.compiler.distill.settings import settings_for
    from sdc.compiler.load import load_checkpoint
    from sdc.compiler.plain_json import check_writable

    if args.out.suffix != ".safetensors":
        raise InputError(f"{args.out} is no name of a LoRA", hint="end it in .safetensors")
    check_writable(args.out)
    settings = _with_arguments(settings_for(args.model), args)
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads must be 1 or more, found {args.threads}")
        torch.set_num_threads(args.threads)
    checkpoint = load_checkpoint(args.model)
    pictures = _open_pictures(args, checkpoint, settings.seed)
    reporting = Reporting(
        args.work or args.out.with_suffix(".work"),
        _grid_prompts(args.model, pictures),
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


def _with_arguments(settings: DistillSettings, args: argparse.Namespace) -> DistillSettings:
    """The defaults with what was asked for in their place."""
    asked = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(settings)}
    if args.guidance is not None:
        asked["guidance"] = parse_range(args.guidance)
    return dataclasses.replace(settings, **{name: value for name, value in asked.items() if value is not None})


def parse_range(text: str) -> tuple[float, float]:
    """Read ``LOW:HIGH``, or one number for both.

    Raises:
        InputError: it is neither.
    """
    try:
        numbers = [float(part) for part in text.split(":")]
        low, high = numbers * 2 if len(numbers) == 1 else numbers
    except ValueError as error:
        raise InputError(f"{text!r} is no range of guidance scales", hint="for example --guidance 6:9") from error
    return low, high


def _open_pictures(args: argparse.Namespace, checkpoint: Checkpoint, seed: int) -> Pictures:
    from sdc.compiler.distill.pictures import FolderPictures, TinyPictures
    from sdc.compiler.trace.interfaces import pipeline_settings
    from sdc.engines.errors import InputError

    if args.model == "tiny":
        if args.size is not None:
            raise InputError("the pictures of tiny have a size of their own", hint="leave --size out")
        return TinyPictures(args.data, seed=seed)
    own = pipeline_settings({name: source.config for name, source in checkpoint.networks.items()})
    if args.size is None:
        return FolderPictures(args.data, size_px=(own.default_height_px, own.default_width_px))
    levels = len(checkpoint.config("unet")["block_out_channels"]) - 1
    return FolderPictures(args.data, size_px=parse_size(args.size, multiple=own.vae_reduction * 2**levels))


def parse_size(text: str, *, multiple: int) -> tuple[int, int]:
    """Read ``HEIGHTxWIDTH`` in pixels.

    Raises:
        InputError: it is not that, or the model cannot take it.
    """
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) and int(side) % multiple == 0 for side in sides):
        raise InputError(f"{text!r} is no size for this model", hint=f"give HEIGHTxWIDTH in multiples of {multiple}")
    return int(sides[0]), int(sides[1])


def _grid_prompts(model: str, pictures: Pictures) -> list[str]:
    """Captions that the pictures have, spread over them; of tiny, the evaluation's."""
    from sdc.compiler.evaluate.settings import JUDGED_MODEL, prompts_of_model

    if model == JUDGED_MODEL:
        return prompts_of_model(model, GRID_PROMPTS)
    distinct = list(dict.fromkeys(captions[0] for captions in pictures.captions))
    return distinct[:: max(1, len(distinct) // GRID_PROMPTS)][:GRID_PROMPTS]
