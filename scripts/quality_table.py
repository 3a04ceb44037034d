"""Every precision on every backend that runs here, against fp32 at equal prompts and seeds.

    python scripts/quality_table.py --out build/quality                            # 5,000 pictures, 3 seeds: hours
    python scripts/quality_table.py --out build/quality --seeds 1 --samples 1000   # a first look
    python scripts/quality_table.py --out build/quality --precisions int8 auto     # some rows, and the reference

Prints the tables. Can be interrupted: pictures of fp32 and the figures of every run are kept in the folder, and made
again only if something changes that they depend on; --figures keeps the figures, some kB a run, elsewhere. Bundles are
exported anew, from the cache where nothing changed; epsilon and times are measured anew. A reference that fails ends
the run; another row is left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from make_control import write_control
from unet_steps import time_in_turn, unet_bytes

from sdc.compiler.compile import export_bundle
from sdc.compiler.evaluate.epsilon import EpsilonRow, epsilon_rows
from sdc.compiler.evaluate.gather import PictureMaker, gather
from sdc.compiler.evaluate.opened import opened
from sdc.compiler.evaluate.settings import (
    JUDGED_MODEL,
    TRIPLES,
    Settings,
    prompt_triples,
    prompts_of_model,
    prompts_of_triples,
)
from sdc.compiler.evaluate.statistics import MODELS_FOLDER, Statistics, load_statistics
from sdc.compiler.evaluate.stored_runs import RunFigures, load_figures, run_digest, save_figures, stored_pictures
from sdc.compiler.evaluate.verdicts import digest_of, load_judge
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.precision.budget import Measure, QualityBudget
from sdc.compiler.precision.capabilities import check_formats
from sdc.compiler.precision.planning import AUTO, PrecisionRequest
from sdc.compiler.stages import Source
from sdc.compiler.text_table import markdown_row
from sdc.engines.bundle import open_bundle
from sdc.engines.errors import NumericalError, SdcError, TargetError
from sdc.engines.targets import Target, parse_targets
from sdc.passes.pipeline import PRECISIONS

CONTROLS = {"4 bits per channel (control)": True, "4 bits per tensor (known bad)": False}
"""Weights rounded to nearest, activations as they are: whether each output channel has its own scale."""
CONTROL = "control"
FIGURES = (
    *("paired.psnr_db", "paired.ssim", "paired.feature_distance", "paired.frechet_to_reference"),
    *("change.frechet_to_real", "bundle.frechet_to_real", "bundle.garment", "bundle.colour", "bundle.held_out"),
)
HEADINGS = (
    *("precision, target", "PSNR, dB", "worst 5 %", "SSIM", "feature distance", "Fréchet to fp32"),
    *("change of Fréchet to real", "Fréchet to real", "garment, %", "colour, %", "unseen pairs, %"),
    *("UNet, MB", "ms a step", "ratio (quartiles)"),
)
DECIMALS = {"paired.psnr_db": 2, "paired.ssim": 5, "paired.feature_distance": 4, "paired.frechet_to_reference": 4}
"""Of figures that are no percentages; 3 otherwise."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        precision: its name.
        target: its name.
        bundle: its folder.
        settings: of the first seed, with the target.
    """

    precision: str
    target: str
    bundle: Path
    settings: Settings

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.precision}, {self.target}"


@dataclass(frozen=True)
class Kept:
    """Folders of what outlives a call.

    Attributes:
        figures: of every run, a JSON file each.
        pictures: of the reference, an array for each seed.
    """

    figures: Path
    pictures: Path


def main() -> None:
    """Export everything, make the pictures that are not there yet, time, print."""
    options = arguments()
    settings = Settings(samples=options.samples, guidance_scale=options.guidance, steps=options.steps)
    rows = export_rows(options.out, options.precisions, options.budgets, parse_targets(options.target), settings)
    threads = len(os.sched_getaffinity(0)) // options.workers
    kind = f"{options.samples}-{options.steps}-{options.guidance:g}-{threads}-threads"
    kept = Kept((options.figures or options.out / "figures") / kind, options.out / "pictures" / kind)
    for folder in (kept.figures, kept.pictures):
        folder.mkdir(parents=True, exist_ok=True)
    judge_path = MODELS_FOLDER / "judge.safetensors"
    statistics = load_statistics(MODELS_FOLDER / "statistics.safetensors", judge_path=judge_path)
    runs = run_all(rows, options.seeds, kept, options.workers)
    rows = [row for row in rows if row.name in runs]
    epsilon = {row.name: epsilon_errors(row, rows[0], statistics) for row in rows[1:]}
    seconds = time_steps(rows)
    print_quality(rows, runs, seconds, statistics)
    print_epsilon(epsilon)
    (options.out / "epsilon.json").write_text(json.dumps(epsilon, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for bundles, pictures and figures")
    parser.add_argument("--figures", type=Path, help="folder for the figures of runs (OUT/figures)")
    parser.add_argument("--samples", type=int, default=5000, help="pictures of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs with different seeds")
    parser.add_argument("--workers", type=int, default=1, help="runs made at once, each with its share of the cores")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.9)
    parser.add_argument("--target", default="cpu,ort-cpu", help="cpu first: the reference is its fp32")
    every = [*PRECISIONS, AUTO, CONTROL]
    parser.add_argument("--precisions", nargs="+", choices=every, default=every, help="rows besides the reference")
    parser.add_argument("--budgets", type=float, nargs="+", default=[50.0], metavar="DB", help="of auto, a row each")
    options = parser.parse_args()
    if not 1 <= options.workers <= len(os.sched_getaffinity(0)):
        parser.error(f"--workers must be in 1..{len(os.sched_getaffinity(0))}, the cores, found {options.workers}")
    return options


def export_rows(
    out: Path, precisions: list[str], budgets_db: list[float], targets: tuple[Target, ...], settings: Settings
) -> list[Row]:
    """A bundle of every precision for every target that runs it, the reference first."""
    model = Source(JUDGED_MODEL)
    exports = [("fp32", model, PrecisionRequest("fp32"), targets if "fp32" in precisions else targets[:1])]
    for name in precisions:
        if name == AUTO:
            for each in budgets_db:
                request = PrecisionRequest(AUTO, budget=QualityBudget(Measure.PSNR, each))
                exports.append((f"{AUTO} {each:g} dB", model, request, targets))
        elif name == CONTROL:
            exports += [(each, source, PrecisionRequest("fp32"), targets[:1]) for each, source in write_controls(out)]
        elif name != "fp32":
            exports.append((name, model, PrecisionRequest(name), targets))
    rows: list[Row] = []
    for name, source, precision, wanted in exports:
        # A bundle for each target: "auto" chooses layers anew for each, int8 the kind of its ranges.
        for target in wanted:
            try:
                check_formats(target, precision.formats())
            except TargetError as error:
                print(f"{name}, {target.name}: {error}")
                continue
            bundle = out / "bundles" / f"{name.split(' (')[0].replace(' ', '-')}-{target.name}"
            try:
                export_bundle(ExportRequest(source, precision, (target,), bundle))
            except SdcError as error:
                if not rows:
                    raise
                print(f"{name}, {target.name}: not in the table: {error}")
                continue
            rows.append(Row(name, target.name, bundle, replace(settings, target=target.name)))
    return rows


def write_controls(out: Path) -> Iterator[tuple[str, Source]]:
    """Models with few bits of weights, by the names of their rows."""
    for name, per_channel in CONTROLS.items():
        folder = out / ("control-per-channel" if per_channel else "control") / JUDGED_MODEL
        shutil.rmtree(folder, ignore_errors=True)
        write_control(folder, bits=4, per_channel=per_channel)
        yield name, Source(str(folder))


def run_all(rows: list[Row], seeds: int, kept: Kept, workers: int) -> dict[str, list[RunFigures]]:
    """The figures of every row, one for each seed, by its name; a row without numbers is left out, the first is not."""
    spawn = multiprocessing.get_context("spawn")
    shares = spawn.Queue()
    cores = sorted(os.sched_getaffinity(0))
    for worker in range(workers):
        shares.put(cores[worker::workers])
    found: dict[str, list[RunFigures]] = {}
    paths = [[kept_path(row, rows[0], seed, kept) for row in rows] for seed in range(seeds)]
    unfinished = [seed for seed, files in enumerate(paths) if not all(path.exists() for path in files)]
    with ProcessPoolExecutor(workers, spawn, initializer=take_cores, initargs=(shares,)) as pool:
        try:
            for drawn in [pool.submit(keep_reference, rows[0], seed, kept) for seed in unfinished]:
                drawn.result()
            runs = {(row, seed): pool.submit(run, row, rows[0], seed, kept) for seed in range(seeds) for row in rows}
            for row in rows:
                try:
                    found[row.name] = [runs[row, seed].result() for seed in range(seeds)]
                except NumericalError as error:
                    if row == rows[0]:
                        raise
                    print(f"{row.name}: not in the table: {error}")
                    for seed in range(seeds):
                        runs[row, seed].cancel()
        except BaseException:  # an interrupt, too, must not wait for all that is queued
            pool.shutdown(cancel_futures=True)
            raise
    return found


def take_cores(shares: multiprocessing.Queue[list[int]]) -> None:
    """Keep a worker to its share: backends bind their threads to cores, the first ones of all that they may use."""
    cores = shares.get()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def kept_path(row: Row, reference: Row, seed: int, kept: Kept) -> Path:
    """The file of a run's figures; its name changes with all that they depend on."""
    return kept.figures / f"{digest(reference)}-{digest(row)}-{seed}.json"


def digest(row: Row) -> str:
    """Of what makes the row's pictures, and of what they are measured by."""
    measures = [digest_of(MODELS_FOLDER / f"{name}.safetensors") for name in ("judge", "statistics")]
    return run_digest(open_bundle(row.bundle).manifest, row.target, measures)


def draw_reference(reference: Row, seed: int, kept: Kept) -> PictureMaker:
    """The reference's pictures of one seed, which are made unless they are kept."""
    seeded = replace(reference.settings, seed=seed, threads=len(os.sched_getaffinity(0)))
    with opened(reference.bundle, seeded) as bundle:
        batch = bundle.largest_batch()
        return stored_pictures(
            kept.pictures / f"{digest(reference)}-{seed}.npy",
            bundle.make_pictures,
            prompts_of_model(JUDGED_MODEL, seeded.samples),
            seeded.picture_seeds(),
            batch=batch,
            progress=partial(tell, f"{reference.name}, seed {seed}", seeded.samples, batch),
        )


def keep_reference(reference: Row, seed: int, kept: Kept) -> None:
    """Make the reference's pictures before several runs want them at once."""
    draw_reference(reference, seed, kept)


def run(row: Row, reference: Row, seed: int, kept: Kept) -> RunFigures:
    """The figures of the row's pictures of one seed, made now or in an earlier call."""
    path = kept_path(row, reference, seed, kept)
    if not path.exists():
        save_figures(draw_and_look(row, reference, seed, kept), path, {"row": row.name, "seed": seed})
    return load_figures(path)


def draw_and_look(row: Row, reference: Row, seed: int, kept: Kept) -> RunFigures:
    """Make the row's pictures and compare them with the reference's, which are kept."""
    seeded = replace(row.settings, seed=seed, threads=len(os.sched_getaffinity(0)))
    judge_path = MODELS_FOLDER / "judge.safetensors"
    statistics = load_statistics(MODELS_FOLDER / "statistics.safetensors", judge_path=judge_path)
    pictures = draw_reference(reference, seed, kept)
    with opened(row.bundle, seeded) as bundle:
        batch = bundle.largest_batch()
        record = gather(
            prompts_of_model(JUDGED_MODEL, seeded.samples),
            seeded.picture_seeds(),
            bundle=pictures if row == reference else bundle.make_pictures,
            reference=pictures,
            judge=load_judge(judge_path),
            period=TRIPLES,
            batch=batch,
            progress=partial(tell, f"{row.name}, seed {seed}", seeded.samples, batch),
        )
    return RunFigures.of(record, prompt_triples(seeded.samples), statistics.real, TRIPLES)


def tell(name: str, total: int, batch: int, done: int) -> None:
    """A line at every tenth."""
    if done * 10 // total > max(done - batch, 0) * 10 // total:
        print(f"{name}: {done} of {total}", flush=True)


def epsilon_errors(row: Row, reference: Row, statistics: Statistics) -> dict[int, float]:
    """Relative error of the UNet's prediction by timestep."""
    with opened(row.bundle, row.settings) as made, opened(reference.bundle, reference.settings) as wanted:
        found: tuple[EpsilonRow, ...] = epsilon_rows(
            made.predict_noise,
            wanted.predict_noise,
            latents=statistics.latents.astype(np.float32),
            encoder_hidden_states=wanted.pipeline.encode(prompts_of_triples(statistics.triples)),
            schedule=wanted.pipeline.schedule,
            seed=0,
        )
    return {each.timestep: each.error for each in found if each.error is not None}


def time_steps(rows: list[Row]) -> np.ndarray:
    """Median seconds of the UNet's engine in a step of one picture, guidance included, rows in turn: [rounds, rows]."""
    with ExitStack() as stack:
        return time_in_turn([stack.enter_context(opened(row.bundle, row.settings)) for row in rows])


def print_quality(
    rows: list[Row], runs: Mapping[str, list[RunFigures]], seconds: np.ndarray, statistics: Statistics
) -> None:
    """Means over seeds; ± is the standard deviation over seeds, of one seed by the jackknife."""
    print(markdown_row(*HEADINGS), markdown_row(*["---"] * len(HEADINGS)), sep="\n")
    for place, row in enumerate(rows):
        mean, noise = figures_over_seeds(runs[row.name])
        worst = np.mean([each.worst for each in runs[row.name]])
        cells = {name: written(name, mean[name], noise.get(name)) for name in FIGURES}
        ratios = np.quantile(seconds[:, place] / seconds[:, 0], (0.25, 0.5, 0.75))
        print(
            markdown_row(
                *(row.name, cells.pop("paired.psnr_db"), f"{worst:.2f}", *cells.values()),
                *(f"{unet_bytes(row.bundle, row.target) / 1e6:.1f}", f"{1000 * np.median(seconds[:, place]):.2f}"),
                f"{ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})",
            )
        )
    others = [each.other_seed for each in runs[rows[0].name]]
    names = [name for name in FIGURES if name.startswith("paired.") and name in others[0]]
    means = {name: written(name, float(np.mean([each[name] for each in others])), None) for name in names}
    if means:  # a run of so few pictures that no prompt comes twice has none
        print(
            f"fp32 against itself at other seeds: {', '.join(f'{name[7:]} {value}' for name, value in means.items())}"
        )
    print(
        f"Means over seeds; ±: standard deviation {'over seeds' if len(others) > 1 else 'by the jackknife'}. PSNR "
        "counts as 100 dB at most. A Fréchet distance from n pictures has a bias of about 1918 / n. Ratio: the median "
        "over rounds of this row's time to the first row's."
    )
    floors = {name: value for name, value in statistics.figures.items() if name.startswith("reconstruct")}
    print(f"real pictures after the autoencoder: {', '.join(f'{name} {value:.4g}' for name, value in floors.items())}")


def figures_over_seeds(runs: list[RunFigures]) -> tuple[dict[str, float], Mapping[str, float]]:
    """Mean and noise of every figure."""
    mean = {name: float(np.mean([run.figures[name] for run in runs])) for name in runs[0].figures}
    if len(runs) > 1:
        return mean, {name: float(np.std([run.figures[name] for run in runs], ddof=1)) for name in mean}
    return mean, runs[0].noise


def written(name: str, value: float, noise: float | None) -> str:
    """A figure with its noise; accuracies in percent."""
    percent = name.split(".")[1] in ("garment", "colour", "held_out")
    scale, digits = (100, 2) if percent else (1, DECIMALS.get(name, 3))
    spread = "" if noise is None else f" ± {scale * noise:.{digits}f}"
    return f"{scale * value:.{digits}f}{spread}"


def print_epsilon(epsilon: Mapping[str, Mapping[int, float]]) -> None:
    """Per cent, by timestep."""
    timesteps = sorted({timestep for errors in epsilon.values() for timestep in errors})
    print()
    print(markdown_row("epsilon error, %, at timestep", *map(str, timesteps)))
    print(markdown_row("---", *["---"] * len(timesteps)))
    for name, errors in epsilon.items():
        print(markdown_row(name, *(f"{100 * errors[timestep]:.3f}" for timestep in timesteps)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
