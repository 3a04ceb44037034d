"""Time and memory from the start of a process to the first step of a picture, by what is done meanwhile.

    python scripts/load_time.py build/sd15-int8 --rounds 5
    python scripts/load_time.py build/sd15-int8 --beside ../other-worktree build/other-int8 --rounds 5

Each round is a fresh process for each bundle, in turn; files are in the system's cache after the first round, which
does not count. Times are in seconds since the process was started (`/proc/self/stat`), medians: when a stage ended.
"first step begins" is when the UNet's engine is called with all that it needs. With `--beside` another checkout of sdc
draws from a bundle of its own, in the same rounds. Memory is the largest resident set of a process that ends after the
second step, with engines loaded as `sdc run` does (`keep_loaded=False`). Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

STAGES = (
    "imports done",
    "bundle opened",
    "text encoder ready",
    "text encoded",
    "prompt's share of the UNet",
    "timesteps' share of the UNet",
    "UNet read",
    "UNet compiled",
    "first step begins",
    "first step ends",
    "second step ends",
)

CHILD = '''
import json, os, resource, sys, time

def since_start():
    """Seconds since this process was started. Source: proc_pid_stat(5), field 22, and clock_gettime(2)."""
    ticks = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")

bundle, target, size, steps, threads, seed = sys.argv[1:]
times = {}

def note(stage):
    times[stage] = since_start()

def noting(function, stage_of):
    def noted(*arguments, **options):
        result = function(*arguments, **options)
        stage = stage_of(*arguments)
        if stage:
            note(stage)
        return result
    return noted

import sdc.engines.pipeline
if target == "cpu":
    import sdc.engines.sessions.openvino as backend
from sdc.engines import load
note("imports done")

if target == "cpu":
    compiled = {"text_encoder": "text encoder ready", "unet": "UNet compiled"}
    read = {"unet": "UNet read"}
    backend.read_engine = noting(backend.read_engine, lambda source: read.get(source.spec.name))
    backend.compile_engine = noting(backend.compile_engine, lambda model, source, *_: compiled.get(source.spec.name))

class Enough(Exception):
    pass

def step(done):
    if done.index == 0:
        note("first step ends")
        times["first step begins"] = times["first step ends"] - done.seconds
        if "UNet compiled" in times:
            times["first step begins"] = max(times["first step begins"], times["UNet compiled"])
    if done.index == 1:
        note("second step ends")
        raise Enough

size = None if size == "None" else int(size)
with load(bundle, target, threads=int(threads), keep_loaded=False) as pipe:
    note("bundle opened")
    networks = pipe.networks
    networks.encode_text = noting(networks.encode_text, lambda *_: "text encoded")
    shares = {"unet_prompt": "prompt's share of the UNet", "unet_timestep": "timesteps' share of the UNet"}
    networks._run_part = noting(networks._run_part, lambda part, _: shares.get(part.name))
    plan = pipe.plan("a cat", "blurry", steps=int(steps), seed=int(seed), height=size, width=size)
    try:
        pipe.denoise(plan, on_step=step)
    except Enough:
        pass
times["MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
print(json.dumps(times))
'''


def main() -> None:
    """Print a row for each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--beside", type=Path, nargs=2, metavar=("CHECKOUT", "BUNDLE"), help="another checkout of sdc, and its bundle"
    )
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--size", type=int, metavar="PX")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    sides = {str(options.bundle): (here, options.bundle)}
    if options.beside is not None:
        checkout, bundle = options.beside
        sides = {f"{bundle}, {checkout.name}": (checkout, bundle), **sides}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as scratch:
        roots = {checkout: package_root(checkout, Path(scratch)) for checkout, _ in sides.values()}
        for number in range(options.rounds + 1):
            for side, (checkout, bundle) in sides.items():
                times = measure(roots[checkout], bundle.resolve(), options)
                if number:
                    found[side].append(times)
    print("| seconds from the start of the process | " + " | ".join(sides) + " |")
    print("|---" * (1 + len(sides)) + "|")
    for stage in (*STAGES, "MB"):
        cells = [describe([times[stage] for times in rounds if stage in times], stage) for rounds in found.values()]
        print(f"| {'largest resident set, MB' if stage == 'MB' else stage} | " + " | ".join(cells) + " |")


def describe(values: list[float], stage: str) -> str:
    """The median and the range."""
    if not values:
        return "–"
    if stage == "MB":
        return f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def package_root(checkout: Path, scratch: Path) -> Path:
    """A folder from which `sdc` is imported as that checkout has it; its rooms have other names in the package."""
    package = scratch / str(len(list(scratch.iterdir()))) / "sdc"
    package.mkdir(parents=True)
    for room in ("engines", "passes", "compiler"):
        (package / room).symlink_to(checkout.resolve() / room)
    return package.parent


def measure(root: Path, bundle: Path, options: argparse.Namespace) -> dict[str, float]:
    """One process."""
    arguments = (str(bundle), options.target, *map(str, (options.size, options.steps, options.threads, 1)))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    times: dict[str, float] = json.loads(done.stdout)
    return times


if __name__ == "__main__":
    main()
