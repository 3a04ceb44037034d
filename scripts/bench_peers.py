"""Stable Diffusion 1.5 on this machine's processor: sdc beside its peers, in one run.

    python scripts/bench_peers.py --prepare-only        # environments, weights, exports: once, an hour or more
    python scripts/bench_peers.py                       # measure on a quiet machine: hours; goes on where it stopped
    python scripts/bench_peers.py --report              # tables and plots of what there is
    python scripts/bench_peers.py --architecture tiny --out build/tiny.json --rounds 2        # to try it out

Every side has the same weights (random ones of the architecture, from a seed), the same inputs and a process of its own
for each component, which is asked over a pipe, so only the side whose turn it is computes. Peers are installed from
PyPI into environments of their own below `--work`. A side that cannot be installed, prepared or run is a row with the
reason.

- Components: a UNet step with guidance (batch 2; of sdc, what is hoisted out and runs once a picture is in the picture
  only), the VAE decoder, the text encoder (batch 2), a whole picture (DDIM, 20 steps; stable-diffusion.cpp: its Euler),
  and the time from a process's start to its first denoising step, from the second start on.
- Sides take turns in rounds, and another one begins each round. A turn waits until others keep no more than `--foreign`
  processors busy, is tried again if they did not keep to it, and is marked if no try was undisturbed.
- Memory does not hold all sides at once. As many processes stay up as fit into `--memory-gib` with the largest of the
  others; those are opened anew in each round, and called three times before their calls count. A call of more than 20 s
  is a turn by itself, after one call that does not count; stable-diffusion.cpp takes part in two rounds only.
- Peak memory is VmHWM of the process of one component, with files that are mapped; of torch.compile without the
  compilers that it starts.
- Two rows of sdc draw pictures of less work, and say so in their names; they have no error and no roofline.
- Errors are relative to float32 torch; rooflines are products of large matrices, measured before the UNet.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from peers.bench import Bench, Limits, attempt
from peers.environments import SetUpError, python_of, run_logged, versions_of
from peers.inputs import ARCHITECTURES, check_room, link_bundle, picture_settings, write_inputs
from peers.plot import plot
from peers.protocol import Job
from peers.report import report, thread_counts
from peers.sides import COMPONENTS, OWN, REFERENCE, ROOFLINE_COMPONENTS, ROOFLINES, SIDES, Side, find_side
from peers.store import Store, load_store, open_store
from peers.worker import SideError, prepare_side

STEPS = 20
BUNDLES = ("bf16", "int8", "int8-deepcache")
NAMES = {"unet": "unet", "vae": "vae_decoder", "text": "text_encoder", "picture": "picture", "start": "start"}


def main() -> int:
    """Set up, measure, report."""
    options = arguments()
    if options.report:
        write_report(load_store(options.out), options.out)
        return 0
    store = open_store(options.out, {"architecture": options.architecture, "steps": STEPS})
    store.machine = describe_machine()
    if options.retry:
        store.failures.clear()
    sides = [find_side(key) for key in options.peers]
    bench = set_up(options, store, sides)
    if not options.prepare_only:
        measure(options, bench, sides)
        write_report(store, options.out)
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys = [side.key for side in SIDES]
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench-peers.json"), help="figures; table and plot beside"
    )
    parser.add_argument("--work", type=Path, default=Path("build/bench-peers"), help="environments, weights, exports")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sd15")
    parser.add_argument("--peers", nargs="+", choices=keys, default=keys, metavar="SIDE", help=", ".join(keys))
    parser.add_argument("--only", type=names, default=list(COMPONENTS), help=f"of {','.join(NAMES)}")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--picture-rounds", type=int, default=3, help="of whole pictures, with the first of --threads")
    parser.add_argument("--start-rounds", type=int, default=4, help="of starts, likewise; the first does not count")
    parser.add_argument("--foreign", type=float, default=0.1, help="processors that others may keep busy (0.1)")
    parser.add_argument("--tries", type=int, default=3, help="of a turn that others disturb")
    parser.add_argument("--memory-gib", type=float, default=18, help="for all processes together (18)")
    parser.add_argument("--calibration-table", type=Path, help="for sdc's int8; it calibrates itself without one")
    parser.add_argument(
        "--bundles",
        type=bundle_of,
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="bf16, int8 or int8-deepcache, exported for cpu already",
    )
    parser.add_argument("--prepare-only", action="store_true", help="measure nothing")
    parser.add_argument("--retry", action="store_true", help="try again what has failed in an earlier call")
    parser.add_argument("--report", action="store_true", help="write table and plot of --out, and do nothing else")
    return parser.parse_args()


def names(text: str) -> list[str]:
    """Components of "unet,vae,..."."""
    unknown = [name for name in text.split(",") if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(NAMES)}, found {', '.join(unknown)}")
    return [NAMES[name] for name in text.split(",")]


def bundle_of(text: str) -> tuple[str, Path]:
    """What sdc's bundles are called, and folder, of "int8=build/sd15-int8"."""
    name, _, folder = text.partition("=")
    if name not in BUNDLES or not folder:
        raise argparse.ArgumentTypeError(f"expected NAME=DIR with one of {', '.join(BUNDLES)}, found {text}")
    return name, Path(folder).resolve()


def describe_machine() -> dict[str, Any]:
    """What figures have to be read with."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(values.get("flags", "").split())
    return {
        "processor": values.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def set_up(options: argparse.Namespace, store: Store, sides: list[Side]) -> Bench:
    """Weights, inputs, environments, and every side's own files."""
    folder: Path = options.work.resolve() / options.architecture
    if not (folder / "checkpoint").exists():
        check_room(options.work.resolve(), ARCHITECTURES[options.architecture].needed_bytes)
    checkpoint = make_checkpoint(options, folder)
    for name, bundle in options.bundles:
        link_bundle(folder / "made", name, bundle, ARCHITECTURES[options.architecture])
    inputs = folder / "inputs.npz"
    if not inputs.exists():
        write_inputs(checkpoint, inputs)
    architecture = ARCHITECTURES[options.architecture]
    job = Job(
        component="unet",
        threads=max(options.threads),
        checkpoint=str(checkpoint),
        made=str(folder / "made"),
        inputs=str(inputs),
        picture=picture_settings(architecture, checkpoint),
    )
    table = options.calibration_table
    of_sdc = {
        "model": architecture.model,
        "weights": architecture.weights,
        "calibration_table": None if table is None else str(table.resolve()),
    }
    bench = Bench(
        store=store,
        pythons={},
        job=job,
        options={side.key: {**side.options, **(of_sdc if side.ours else {})} for side in SIDES},
        steps=STEPS,
        folder=folder,
        limits=Limits(foreign=options.foreign, tries=options.tries, memory_bytes=int(options.memory_gib * 2**30)),
    )
    for side in with_needed([*ROOFLINES, find_side(REFERENCE), *sides]):
        if store.failure(side.key, "all") is None:
            attempt(partial(prepare, options, bench, side), store, side, "set-up")
    return bench


def with_needed(sides: list[Side]) -> list[Side]:
    """The sides and those that they are prepared from, in the order of preparation."""
    needed: list[Side] = []
    for side in sides:
        for each in with_needed([find_side(side.needs)]) if side.needs else []:
            if each not in needed:
                needed.append(each)
        if side not in needed:
            needed.append(side)
    return needed


def make_checkpoint(options: argparse.Namespace, folder: Path) -> Path:
    """A diffusers folder of the weights in float32."""
    checkpoint = folder / "checkpoint"
    architecture = ARCHITECTURES[options.architecture]
    if not checkpoint.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / "checkpoint.unfinished"
        script = str(Path(__file__).with_name("save_checkpoint.py"))
        arguments = ["--model", architecture.model, "--weights", architecture.weights, str(unfinished)]
        subprocess.run([sys.executable, script, *arguments], check=True)
        unfinished.rename(checkpoint)
    return checkpoint


def prepare(options: argparse.Namespace, bench: Bench, side: Side) -> None:
    """A side's environment and its files.

    Raises:
        SetUpError: they could not be made.
    """
    print(f"{side.key}: setting up", flush=True)
    environments = options.work.resolve() / "environments"
    python = python_of(side.environment, environments, run=run_logged)
    bench.pythons[side.environment] = python
    if side.environment not in bench.store.versions:
        bench.store.versions[side.environment] = versions_of(python)
    log = bench.folder / "logs" / f"{side.key}-prepare.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    job = bench.job_of(side, "unet", max(options.threads))
    limits = bench.limits
    prepare_side(side, python, job, log=log, limit_bytes=limits.memory_bytes, timeout=2 * limits.answer_seconds)


def measure(options: argparse.Namespace, bench: Bench, sides: list[Side]) -> None:
    """Everything that is wanted and not known yet."""
    for threads in options.threads:
        for component in options.only:
            rounds = {"picture": options.picture_rounds, "start": options.start_rounds}.get(component, options.rounds)
            if component in ("picture", "start") and threads != options.threads[0]:
                continue
            able = [side for side in sides if component in side.components and able_to_run(bench, side)]
            try:
                bench.make_reference(component, threads)
            except SideError as error:
                print(f"no reference of {component}: {error}", file=sys.stderr, flush=True)
            if component == "unet":
                for product in ROOFLINE_COMPONENTS:
                    rooflines = [each for each in ROOFLINES if able_to_run(bench, each)]
                    bench.measure_component(product, threads, rooflines, rounds)
            bench.measure_component(component, threads, able, rounds)
            bench.note_errors(component, able)


def able_to_run(bench: Bench, side: Side) -> bool:
    """Whether it was set up."""
    return bench.store.failure(side.key, "all") is None and (
        side.environment in bench.pythons or side.environment == OWN
    )


def write_report(store: Store, out: Path) -> None:
    """Tables on the terminal and beside the figures; a plot for each number of threads."""
    text = report(store)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    for threads in thread_counts(store):
        out.with_name(f"{out.stem}-{threads}.svg").write_text(plot(store, threads), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SetUpError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
