"""`sdc run`: a bundle and a prompt in, PNG files out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdc.compiler.cli.memory_limit import add_memory_limit, fit_generation
from sdc.compiler.cli.pictures import add_shortcut_arguments
from sdc.engines import load
from sdc.engines.errors import InputError
from sdc.engines.preset import AUTO, USUAL_GUIDANCE, Asked, Preset, Way, complete_way, options_text, preset_values
from sdc.engines.specs import SHALLOW

if TYPE_CHECKING:
    from sdc.engines.networks import DenoisingStep

SUMMARY = "draw pictures with a bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to draw")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--sampler", metavar="NAME", help="ddim (default), lcm, euler or dpmpp-2m")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: 20, with lcm 4)")
    parser.add_argument(
        "--guidance", type=float, metavar="W",
        help=f"guidance weight; up to 1 there is none (default: {USUAL_GUIDANCE:g})",
    )  # fmt: skip
    parser.add_argument("--eta", type=float, default=0.0, metavar="E", help="ddim: new noise at each step, 0 to 1")
    add_shortcut_arguments(parser, auto=True)
    parser.add_argument(
        "--no-preset", action="store_true", help="of a bundle of `sdc tune`: take none of these options from its preset"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the noise, as diffusers' (default: random)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="number of pictures (default: 1)")
    parser.add_argument("--height", type=int, metavar="PX", help="of the pictures (default: the model's own)")
    parser.add_argument("--width", type=int, metavar="PX", help="of the pictures (default: the model's own)")
    parser.add_argument("--target", metavar="NAME", help="target of the bundle (default: the best for this machine)")
    add_memory_limit(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: the backend's choice)")
    parser.add_argument(
        "--no-prefetch",
        action="store_true",
        help="load no engine while another runs, the UNet beside the text encoder or a shard beside the one before: "
        "slower, and takes less memory",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out.png"), metavar="F.png",
        help="file to write, numbered F-1.png, F-2.png, ... if there are several pictures (default: out.png)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, nargs="?", const=Path("-"), metavar="FILE",
        help="write a report for machines; without FILE, print only that on the standard output",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Draw and write the pictures."""
    _check_output(args.out)
    begin = time.perf_counter()
    step_seconds: list[float] = []
    engines: list[str] = []
    prefetch = not args.no_prefetch and args.memory_limit is None  # engines that are loaded together take more
    with load(args.bundle, args.target, threads=args.threads, keep_loaded=False, prefetch=prefetch) as pipe:
        way = _way(args, pipe.preset)
        generation = pipe.plan(
            args.prompt,
            args.negative_prompt,
            sampler=way.sampler,
            steps=way.steps,
            guidance_scale=way.guidance_scale,
            seed=args.seed,
            batch=args.batch,
            height=args.height,
            width=args.width,
            eta=args.eta,
            guidance_steps=way.guidance_steps,
            deepcache=way.deepcache,
            deepcache_center=way.deepcache_center,
        )
        if args.memory_limit is not None:
            fit = fit_generation(args.bundle, pipe.provenance["target"], generation, args.memory_limit)
            print(f"memory: {fit}", file=sys.stderr)
            generation = replace(generation, measures=fit.measures)
        images = pipe.draw(generation, on_step=_show_progress(step_seconds, engines))
        provenance = dict(pipe.provenance)
    seconds = time.perf_counter() - begin
    paths = [_numbered(args.out, index, len(images)) for index in range(len(images))]
    _save(images, paths)
    target = provenance["target"]
    print(
        f"{_summary(step_seconds, engines)}, {seconds:.2f} s in all on {target}, seed {generation.seeds[0]}",
        file=sys.stderr,
    )
    report = {
        "pictures": [
            {"file": str(path), **generation.parameters(index), **provenance} for index, path in enumerate(paths)
        ],
        "step_seconds": step_seconds,
        "seconds": seconds,
    }
    text = json.dumps(report, indent=2)
    if args.json == Path("-"):
        print(text)
        return 0
    if args.json is not None:
        _write_text(args.json, text + "\n")
    print("\n".join(map(str, paths)))
    return 0


def _way(args: argparse.Namespace, preset: Preset | None) -> Way:
    """How to draw, by the options and the bundle's preset; says what the preset sets."""
    asked = Asked(
        sampler=args.sampler,
        steps=args.steps,
        guidance_scale=args.guidance,
        guidance_steps=args.guidance_steps,
        deepcache=args.deepcache,
        deepcache_center=args.deepcache_center,
    )
    if args.no_preset and args.deepcache == AUTO:
        raise InputError("--deepcache auto is a part of the preset", hint="leave out --no-preset, or one of both")
    taken = None if args.no_preset else preset
    measured = preset_values(asked, taken)
    if measured:
        print(f"preset of the bundle: {options_text(measured)} (--no-preset leaves it out)", file=sys.stderr)
    return complete_way(asked, taken)


def _check_output(path: Path) -> None:
    """Refuse a file that cannot be written before the time is spent."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {path} does not end in .png", hint="pictures are written as PNG")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} of --out does not exist", hint="make it first")
    if path.is_dir():
        raise InputError(f"--out {path} is a folder", hint="name a file")


def _show_progress(step_seconds: list[float], engines: list[str]) -> Callable[[DenoisingStep], None]:
    """A callback that notes each step's time and engine, and shows the time on a line that it overwrites."""
    overwrites = sys.stderr.isatty()

    def show(step: DenoisingStep) -> None:
        step_seconds.append(step.seconds)
        engines.append(step.component)
        line = f"step {step.index + 1}/{step.count}  {step.seconds * 1000:.1f} ms"
        last = step.index + 1 == step.count
        if overwrites:
            print(f"\r{line}\x1b[K", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    return show


def _summary(step_seconds: list[float], engines: list[str]) -> str:
    """The median time of the steps after the first, in which an engine gets ready; with DeepCache of each engine's."""
    parts = []
    for engine in dict.fromkeys(engines):
        of_engine = [each for each, its in zip(step_seconds, engines, strict=True) if its == engine]
        timed = sorted(of_engine[1:] or of_engine)
        kind = "shallow steps" if engine == SHALLOW else "steps"
        parts.append(f"{len(of_engine)} {kind} of {timed[len(timed) // 2] * 1000:.1f} ms")
    return f"{' and '.join(parts)} (median)"


def _numbered(path: Path, index: int, count: int) -> Path:
    """The file of picture `index`: F-01.png to F-12.png for twelve."""
    if count == 1:
        return path
    return path.with_name(f"{path.stem}-{index + 1:0{len(str(count))}d}{path.suffix}")


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _save(images: list[Any], paths: list[Path]) -> None:
    from sdc.engines.picture import save_png

    for image, path in zip(images, paths, strict=True):
        save_png(image, path)
