"""A UNet in shards beside the whole one: memory of a process that runs denoising steps, under a limit, and their time.

    sdc export --model sd15 --weights random --precision int8 --target cpu --out build/sd15-int8
    sdc export --model sd15 --weights random --precision int8 --target cpu --shards 8 --out build/sd15-int8-8
    python scripts/bench_shards.py build/sd15-int8-8 --whole build/sd15-int8 --limit-mib 600

Each run is a process of its own, in a control group whose memory the system limits; the whole UNet's has no limit.
Pages of the bundles' files are dropped from the system's cache before, so that reading them counts. "resident" is the
process's high-water mark of anonymous and file pages together, "group" that of all that the system charges to the
group. The first step, in which backends get ready, is left out of the median. Limits need root's rights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

GROUPS = Path("/sys/fs/cgroup")
MIB = 2**20
NOT_COUNTED = 1
"""Steps at the start: backends compile."""


def main() -> None:
    """Run all variants in turn and print a table; or, in a child, run one."""
    parser = argparse.ArgumentParser(description="memory and time of a UNet in shards")
    parser.add_argument("bundle", type=Path, help="exported with --shards")
    parser.add_argument("--whole", type=Path, help="the same model without")
    parser.add_argument("--limit-mib", type=int, nargs="*", default=[600], help="limits of the runs in shards")
    parser.add_argument("--target")
    parser.add_argument("--size", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=("prefetch", "one"), help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(run_steps(options)))
        return
    print("| UNet | limit, MiB | resident, MiB | group, MiB | first step, s | step, s | ratio |")
    print("|---|---|---|---|---|---|---|")
    whole = None
    if options.whole is not None:
        whole = run_child(options, options.whole, "prefetch", None)
        print(row("whole", None, whole, whole), flush=True)
    for limit in options.limit_mib:
        for kind, name in (("prefetch", "shards, next one prefetched"), ("one", "shards, one at a time")):
            print(row(name, limit, run_child(options, options.bundle, kind, limit), whole), flush=True)


def row(name: str, limit_mib: int | None, found: dict[str, Any] | None, whole: dict[str, Any] | None) -> str:
    """One line of the table."""
    limit = "none" if limit_mib is None else str(limit_mib)
    if found is None:
        return f"| {name} | {limit} | killed | | | | |"
    first, *others = found["seconds"]
    seconds = median(others)
    ratio = "" if whole is None else f"{seconds / median(whole['seconds'][NOT_COUNTED:]):.1f}"
    group = "" if found["group"] is None else f"{found['group'] / MIB:.0f}"
    return f"| {name} | {limit} | {found['resident'] / MIB:.0f} | {group} | {first:.1f} | {seconds:.1f} | {ratio} |"


def run_child(options: argparse.Namespace, bundle: Path, kind: str, limit_mib: int | None) -> dict[str, Any] | None:
    """Steps in a process of its own; None if the system killed it."""
    drop_from_cache(bundle)
    arguments = ["--child", kind, "--size", options.size, "--steps", options.steps, "--threads", options.threads]
    with limited_group(None if limit_mib is None else limit_mib * MIB) as group:
        arguments += [] if group is None else ["--group", group]
        arguments += [] if options.target is None else ["--target", options.target]
        command: Sequence[str] = [sys.executable, __file__, str(bundle), *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    if done.returncode < 0:
        return None
    done.check_returncode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def drop_from_cache(bundle: Path) -> None:
    """Ask the system to forget the pages of a bundle's files."""
    for path in bundle.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def limited_group(limit_bytes: int | None) -> Iterator[Path | None]:
    """A control group with that much memory and no swap; cgroups(7), version 2 or 1."""
    second = (GROUPS / "cgroup.controllers").exists()
    group = (GROUPS if second else GROUPS / "memory") / f"sdc-shards-{os.getpid()}"
    group.mkdir()
    try:
        if limit_bytes is not None:
            (group / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(limit_bytes))
            with suppress(OSError):  # a system without swap
                (group / ("memory.swap.max" if second else "memory.memsw.limit_in_bytes")).write_text(
                    "0" if second else str(limit_bytes)
                )
        yield group
    finally:
        group.rmdir()


def run_steps(options: argparse.Namespace) -> dict[str, Any]:
    """In the child: the UNet with random conditions, as a sampler with guidance calls it."""
    if options.group is not None:
        (options.group / "cgroup.procs").write_text(str(os.getpid()))
    import numpy as np

    from sdc.engines.bundle import open_bundle
    from sdc.engines.networks import DenoisingStep, Networks

    bundle = open_bundle(options.bundle, verify=False)
    target = bundle.choose_target(options.target)
    prefetch = options.child == "prefetch"
    networks = Networks(
        bundle.manifest.components,
        lambda name: bundle.load_session(name, target, threads=options.threads, prefetch=prefetch),
    )
    generator = np.random.default_rng(0)
    part = bundle.manifest.components.get("unet_prompt", bundle.manifest.components["unet"])
    states = next(tensor for tensor in part.inputs if tensor.name == "encoder_hidden_states")
    conditions = {states.name: generator.standard_normal((2, *states.shape[1:]), np.float32)}
    side = options.size // bundle.manifest.pipeline.vae_reduction
    sample = generator.standard_normal((2, bundle.manifest.pipeline.latent_channels, side, side), np.float32)
    timesteps = np.linspace(981, 1, options.steps).round().tolist()
    seconds: list[float] = []

    def note(step: DenoisingStep) -> None:
        seconds.append(step.seconds)
        print(f"step {step.index + 1}: {step.seconds:.1f} s", file=sys.stderr, flush=True)

    predict = networks.predictor(conditions, steps=options.steps, timesteps=timesteps, on_step=note)
    networks.release(but=("unet",))
    for timestep in timesteps:
        predict(sample, timestep)
    networks.release()
    return {"seconds": seconds, "resident": resident_peak(), "group": group_peak(options.group)}


def resident_peak() -> int:
    """The process's high-water mark, in bytes; proc(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def group_peak(group: Path | None) -> int | None:
    """Likewise, of the control group; None where the system does not tell."""
    for name in () if group is None else ("memory.peak", "memory.max_usage_in_bytes"):
        with suppress(OSError):
            return int((group / name).read_text())
    return None


if __name__ == "__main__":
    main()
