"""What commands that train have in common: arguments, and what is made of them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sdc.engines.errors import InputError

if TYPE_CHECKING:
    from sdc.compiler.distill.pictures import Pictures
    from sdc.compiler.load import Checkpoint

GRID_PROMPTS = 8

Settings = TypeVar("Settings", bound=Any)


def add_training_arguments(parser: argparse.ArgumentParser, *, data_required: bool) -> None:
    """Declare the arguments that mean the same to every kind of training."""
    parser.add_argument(
        "--data",
        type=Path,
        required=data_required,
        metavar="DIR",
        help="of tiny, and what was made of it: the gzipped files of Fashion-MNIST; else pictures and a metadata.jsonl "
        "of file_name and text",
    )
    parser.add_argument("--seed", type=int, help="of the first weights, batches and noise (0)")
    parser.add_argument("--size", metavar="HEIGHTxWIDTH", help="of a folder's pictures, in pixels (the model's own)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="bf16: autocast of the networks (fp32)")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", default=None, help="less memory, a third more time"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="checkpoint, losses, latents and grids (OUT.work)")
    parser.add_argument(
        "--checkpoint-every", type=int, default=100, metavar="N", help="steps between checkpoints (100)"
    )
    parser.add_argument("--grid-every", type=int, default=500, metavar="N", help="steps between picture grids (500)")
    parser.add_argument("--threads", type=int, help="CPU threads (all)")


def with_arguments(settings: Settings, args: argparse.Namespace) -> Settings:
    """The defaults with what was asked for in their place."""
    asked = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(settings)}
    if args.guidance is not None:
        asked["guidance"] = parse_range(args.guidance)
    return dataclasses.replace(settings, **{name: value for name, value in asked.items() if value is not None})


def set_threads(threads: int | None) -> None:
    """Let torch take so many; None leaves it as it is.

    Raises:
        InputError: the number is below 1.
    """
    import torch

    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads must be 1 or more, found {threads}")
        torch.set_num_threads(threads)


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


def open_pictures(args: argparse.Namespace, checkpoint: Checkpoint, seed: int) -> Pictures:
    """The pictures of ``--data`` in the size that was asked for: those of tiny, if that is what the folder holds.

    Raises:
        InputError: they cannot be read, or the size makes no sense.
    """
    from sdc.compiler.distill.pictures import FolderPictures, TinyPictures
    from sdc.compiler.tiny.data import DEBIAN_FOLDER, IMAGE_SIZE_PX, holds_grey_pictures
    from sdc.compiler.trace.interfaces import pipeline_settings

    own = pipeline_settings({name: source.config for name, source in checkpoint.networks.items()})
    if args.model == "tiny" or holds_grey_pictures(args.data):
        if args.size is not None:
            raise InputError("the pictures of tiny have a size of their own", hint="leave --size out")
        if args.data.is_dir() and not holds_grey_pictures(args.data):
            raise InputError(
                f"tiny learns from Fashion-MNIST alone, and {args.data} has no train-images-idx3-ubyte.gz",
                hint=f"install Debian's dataset-fashion-mnist and give --data {DEBIAN_FOLDER}",
            )
        if own.default_height_px != IMAGE_SIZE_PX:
            raise InputError(
                f"{args.data} has pictures of {IMAGE_SIZE_PX} px, and {args.model} draws {own.default_height_px}",
                hint="give a folder of pictures with a metadata.jsonl",
            )
        return TinyPictures(args.data, seed=seed)
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


def grid_prompts(model: str, pictures: Pictures) -> list[str]:
    """Captions that the pictures have, spread over them; of tiny, the evaluation's."""
    from sdc.compiler.evaluate.settings import JUDGED_MODEL, prompts_of_model

    if model == JUDGED_MODEL:
        return prompts_of_model(model, GRID_PROMPTS)
    distinct = list(dict.fromkeys(captions[0] for captions in pictures.captions))
    return distinct[:: max(1, len(distinct) // GRID_PROMPTS)][:GRID_PROMPTS]
