"""What every measure is worth, alone and together: speed-up, memory and Fréchet change from float32's DDIM, as a table.

    python scripts/shortcuts_table.py --model tiny --guidance 1.9 --pictures 1000 --out build/shortcuts
    python scripts/shortcuts_table.py --model sd15 --bundles fp32=build/sd15-fp32 int8=build/sd15-int8 \\
        fp32-lcm=build/sd15-fp32-lcm int8-lcm=build/sd15-int8-lcm --rounds 3 --out build/shortcuts-sd15

Bundles of `tiny` that are not given are exported into `--out`; of other models they are given, all exported with
`--deepcache`, and so are those of a model that `sdc compress` made smaller, and of it with a LoRA that was distilled
for it, for two more rows:

    python scripts/shortcuts_table.py --model tiny --out build/shortcuts \\
        --bundles int8-smaller=build/smaller-int8 int8-smaller-lcm=build/smaller-lcm

Rows without a bundle are left out; the table can be made in parts with `--rows`. What hoisting saves is in every row.
Times are of whole pictures, prompt and decoder included, each row in turn with float32's DDIM in 20 steps (at most two
bundles are loaded at once); the ratios' median and quartiles. Memory is the most that a process of `sdc run` holds,
interpreter and libraries included, and its factor is to the same row. Fréchet change is that of the distance to real
pictures at equal prompts and seeds, ± its standard deviation over seeds; for models without a judge only speed and
memory are measured, and PSNR with `--pictures`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from unet_steps import ratio_text

from sdc.compiler.compare.outputs import seconds_in_turn
from sdc.compiler.compile import export_bundle
from sdc.compiler.evaluate.gather import PictureMaker
from sdc.compiler.evaluate.opened import OpenedBundle, opened
from sdc.compiler.evaluate.settings import JUDGED_MODEL, Settings, prompts_of_model
from sdc.compiler.evaluate.stored_runs import stored_pictures
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.memory.engine_plan import Request
from sdc.compiler.memory.measure import measure_run
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import Source
from sdc.compiler.text_table import markdown_row
from sdc.compiler.tune.measure import batch_of, compare_with, settings_of_way
from sdc.engines.bundle import open_bundle
from sdc.engines.preset import Way
from sdc.engines.targets import parse_targets

BUNDLES = {"fp32": ("fp32", ()), "int8": ("int8", ()), "fp32-lcm": ("fp32", ("lcm",)), "int8-lcm": ("int8", ("lcm",))}
"""Precision and LoRAs of each bundle that rows are drawn with."""

KNOWN = (*BUNDLES, "int8-smaller", "int8-smaller-lcm")
"""Bundles that can be given; the last two have to be for `tiny` too."""

REFERENCE = "fp32, DDIM 20"

HEADINGS = ("pictures", "s", "speed-up (quartiles)", "memory, MB", "factor", "Fréchet change", "PSNR, dB")

WARM_UPS = 1


@dataclass(frozen=True)
class Row:
    """A way to draw with a bundle.

    Attributes:
        name: as the table has it.
        bundle: of `KNOWN`.
        way: sampler, steps, guidance and shortcuts.
    """

    name: str
    bundle: str
    way: Way


@dataclass(frozen=True)
class Found:
    """What a row was found to be worth.

    Attributes:
        name: of the row.
        way: how it was drawn.
        seconds: of one picture, of each round; likewise ``reference_seconds`` of the reference's in turn.
        memory_bytes: of a process that draws one.
        change: of the Fréchet distance, and ``noise`` its standard deviation over seeds; None without a judge.
        psnr_db: to the reference's pictures; None where none were compared.
    """

    name: str
    way: Way
    seconds: tuple[float, ...]
    reference_seconds: tuple[float, ...]
    memory_bytes: int
    change: float | None
    noise: float | None
    psnr_db: float | None


def rows_of(guidance: float, guided: int) -> tuple[Row, ...]:
    """All rows, the reference first.

    Args:
        guidance: of DDIM.
        guided: of its 20 steps, in the rows with an interval.
    """
    plain = Way("ddim", 20, guidance)
    cached, interval = replace(plain, deepcache=3), replace(plain, guidance_steps=(0, guided))
    few, more = Way("lcm", 4, 1.0), Way("lcm", 6, 1.0, deepcache=(0, 1, 2, 3, 5))
    return (
        Row(REFERENCE, "fp32", plain),
        Row("fp32, DDIM 50", "fp32", replace(plain, steps=50)),
        Row("int8", "int8", plain),
        Row("DeepCache 3", "fp32", cached),
        Row(f"guidance at 0:{guided}", "fp32", interval),
        Row("LCM-LoRA, 4 steps", "fp32-lcm", few),
        Row("int8, DeepCache 3", "int8", cached),
        Row(f"int8, DeepCache 3, guidance at 0:{guided}", "int8", replace(interval, deepcache=3)),
        Row("int8, LCM-LoRA, 4 steps", "int8-lcm", few),
        Row("int8, LCM-LoRA, 4 steps, DeepCache 2", "int8-lcm", replace(few, deepcache=2)),
        Row("int8, LCM-LoRA, 6 steps, DeepCache in the fifth", "int8-lcm", more),
        Row("smaller, int8", "int8-smaller", plain),
        Row("smaller, int8, DeepCache 3", "int8-smaller", cached),
        Row("smaller, int8, LCM-LoRA, 4 steps", "int8-smaller-lcm", few),
        Row("smaller, int8, LCM-LoRA, 4 steps, DeepCache 2", "int8-smaller-lcm", replace(few, deepcache=2)),
        Row("smaller, int8, LCM-LoRA, 6 steps, DeepCache in the fifth", "int8-smaller-lcm", more),
    )


def main() -> None:
    """Make or take bundles, measure row by row, print each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=JUDGED_MODEL, help="tiny is exported; others are given (tiny)")
    parser.add_argument("--bundles", nargs="*", default=[], metavar="NAME=DIR", help=f"of {', '.join(KNOWN)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for bundles, pictures and the table")
    parser.add_argument("--pictures", type=int, help="that are compared (1000 for tiny, none for others)")
    parser.add_argument("--rounds", type=int, default=9, help="timed pictures of each row")
    parser.add_argument("--guidance", type=float, default=3.0, help="of DDIM (3)")
    parser.add_argument("--guided", type=int, default=15, help="of 20 steps, in rows with a guidance interval (15)")
    parser.add_argument("--rows", metavar="TEXT", default="", help="only rows with this in their name, and the first")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bundles = given_bundles(parser, options.bundles)
    if options.model == JUDGED_MODEL:
        bundles |= {name: export(name, options.out, options.target) for name in BUNDLES if name not in bundles}
    if "fp32" not in bundles:
        parser.error("all rows are compared with fp32's: give --bundles fp32=DIR, or --model tiny")
    pictures = options.pictures if options.pictures is not None else 1000 if options.model == JUDGED_MODEL else 0
    settings = Settings(samples=max(1, pictures), target=options.target, threads=options.threads)
    rows = [row for row in rows_of(options.guidance, options.guided) if row.bundle in bundles]
    rows = [row for row in rows if row.name == REFERENCE or options.rows in row.name]
    lines = [markdown_row(*HEADINGS), markdown_row(*["---"] * len(HEADINGS))]
    print(*lines, sep="\n", flush=True)
    found: list[Found] = []
    wanted = settings_of_way(rows[0].way, settings)
    with opened(bundles["fp32"], wanted) as first:
        pictures_of = reference_pictures(first, options.out) if pictures else None
    for row in rows:
        found.append(measure(row, bundles, wanted, pictures_of, options.rounds))
        lines.append(line_of(found[-1], found[0]))
        print(lines[-1], flush=True)
    (options.out / "shortcuts.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (options.out / "shortcuts.json").write_text(json.dumps([asdict(each) for each in found], indent=2) + "\n")


def given_bundles(parser: argparse.ArgumentParser, texts: list[str]) -> dict[str, Path]:
    """NAME=DIR each."""
    bundles = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if name not in KNOWN or not folder:
            parser.error(f"--bundles {text}: expected NAME=DIR with one of {', '.join(KNOWN)}")
        bundles[name] = Path(folder)
    return bundles


def export(name: str, folder: Path, target: str) -> Path:
    """A bundle of `tiny` with a shallow UNet."""
    precision, loras = BUNDLES[name]
    source = Source(JUDGED_MODEL, loras=tuple(f"{JUDGED_MODEL}-{lora}" for lora in loras))
    out = folder / f"{JUDGED_MODEL}-{name}"
    export_bundle(ExportRequest(source, PrecisionRequest(precision), parse_targets(target), out, deepcache=0))
    return out


def reference_pictures(bundle: OpenedBundle, folder: Path) -> PictureMaker:
    """The reference's, drawn once; in a folder of this run's own."""
    settings = bundle.settings
    path = folder / "reference.npy"
    path.unlink(missing_ok=True)  # of another run, with other bundles
    prompts = prompts_of_model(bundle.manifest.model.name, settings.samples)
    return stored_pictures(
        path,
        bundle.make_pictures,
        prompts,
        settings.picture_seeds(),
        batch=batch_of(bundle),
        progress=lambda _: None,
    )


def measure(
    row: Row, bundles: Mapping[str, Path], reference: Settings, pictures_of: PictureMaker | None, rounds: int
) -> Found:
    """Time the row beside the reference, then draw its pictures, then see what memory a process takes."""
    path, settings = bundles[row.bundle], settings_of_way(row.way, reference)
    change = noise = psnr_db = None
    with opened(bundles["fp32"], reference) as first, opened(path, settings) as bundle:
        prompts = prompts_of_model(bundle.manifest.model.name, 1)
        calls = [partial(each.make_pictures, prompts, [0]) for each in (first, bundle)]
        seconds = seconds_in_turn(calls, rounds=rounds, warm_ups=WARM_UPS)
        if pictures_of is not None:
            judged = bundle.manifest.model.name == JUDGED_MODEL
            figure = "change.frechet_to_real" if judged else "paired.psnr_db"
            value, spread, psnr_db = compare_with(bundle, pictures_of, figure, progress=lambda _: None)
            change, noise = (value, spread) if judged else (None, None)
    return Found(
        name=row.name,
        way=row.way,
        seconds=tuple(seconds[:, 1].tolist()),
        reference_seconds=tuple(seconds[:, 0].tolist()),
        memory_bytes=memory_of(path, settings),
        change=change,
        noise=noise,
        psnr_db=psnr_db,
    )


def memory_of(path: Path, settings: Settings) -> int:
    """Bytes of a process that draws one picture as `sdc run` does."""
    pipeline = open_bundle(path).manifest.pipeline
    request = Request(
        pipeline.default_height_px,
        pipeline.default_width_px,
        pictures=1,
        guidance_scale=settings.guidance_scale,
        deepcache=settings.deepcache != 1,
    )
    assert settings.target is not None
    return measure_run(path, settings.target, request, threads=settings.threads)


def line_of(found: Found, first: Found) -> str:
    """A line of the table."""
    return markdown_row(
        found.name,
        f"{np.median(found.seconds):.3f}",
        ratio_text(np.array(found.reference_seconds), np.array(found.seconds)),
        f"{found.memory_bytes / 1e6:,.0f}",
        f"{first.memory_bytes / found.memory_bytes:.2f}",
        "" if found.change is None else f"{found.change:+.3f} ± {found.noise:.3f}",
        "" if found.psnr_db is None else f"{found.psnr_db:.2f}",
    )


if __name__ == "__main__":
    main()
