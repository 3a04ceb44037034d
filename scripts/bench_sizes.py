"""A UNet's step on OpenVINO by size of the picture and number of rows: seconds and memory, and what explains them.

    pip install -e ".[bench]"
    python scripts/bench_sizes.py build/sd15-bf16 build/sd15-int8 --out build/sizes.json

Every point is a fresh process that runs the UNet's engine once, so that it is compiled for these sizes, and then
`--rounds` times. Memory is the high-water mark of the whole process beside what `sdc plan` says. Time is fitted by

    seconds = fixed + 2 · W / rate of weights + 2 · A / rate of attention

with W the multiply-adds of convolutions and products with weights, which grow with the pixels, and A those of
attention, which grow with their square; counted in the engine's own graph. The fit minimises relative errors of every
other point; the rest only test it. Known points are planned anew but not measured again. Writes a table and a plot
beside `--out`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tables.macs import TARGET, UNET, count_macs

from sdc.compiler.memory.engine_plan import EnginePlan, EnginePlanner, Request
from sdc.compiler.memory.measure import random_feeds
from sdc.compiler.memory.openvino_engines import PROCESS_BYTES
from sdc.compiler.text_table import markdown_row
from sdc.compiler.workshop.worker import Worker
from sdc.engines.bundle import open_bundle

HEADS = (
    *("bundle", "pixels", "rows", "s", "quartiles", "model, s", "model / s", "fitted"),
    *("memory, MB", "planned, MB", "planned / memory"),
)


@dataclass(frozen=True)
class Point:
    """One size.

    Attributes:
        bundle: its folder's name.
        size_px: of square pictures.
        rows: of the UNet's batch.
        weight_macs: multiply-adds with weights in one step; likewise ``attention_macs``.
        seconds: of each round.
        memory_bytes: the most that the process held.
        planned_bytes: what `sdc plan` says of the engine, and of a process.
    """

    bundle: str
    size_px: int
    rows: int
    weight_macs: int
    attention_macs: int
    seconds: tuple[float, ...]
    memory_bytes: int
    planned_bytes: int

    @property
    def median(self) -> float:
        """Seconds of the middle round."""
        return float(np.median(self.seconds))

    @property
    def work(self) -> tuple[float, float, float]:
        """What the fixed time and the two reciprocal rates are multiplied with."""
        return 1.0, 2.0 * self.weight_macs, 2.0 * self.attention_macs


def main() -> None:
    """Measure what is missing, then write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 384, 512, 640, 768, 1024], metavar="PX")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("build/sizes.json"))
    options = parser.parse_args()
    points = [read_point(entry) for entry in json.loads(options.out.read_text())] if options.out.exists() else []
    known = {(point.bundle, point.size_px, point.rows) for point in points}
    for folder in options.bundles:
        planner = EnginePlanner(open_bundle(folder), TARGET)
        points = [planned_anew(point, planner) if point.bundle == folder.name else point for point in points]
        for size in options.sizes:
            for rows in options.rows:
                if (folder.name, size, rows) not in known:
                    points.append(measure(folder, planner, size, rows, options.rounds, options.threads))
                    write_points(options.out, points)
                    print(f"{folder.name} {size} px, {rows} rows: {points[-1].median:.3f} s", flush=True)
    write_points(options.out, points)
    names = list(dict.fromkeys(point.bundle for point in points))
    fits = {name: Fit(of_bundle(points, name)) for name in names}
    text = "\n".join(
        [markdown_row(*HEADS), markdown_row(*["---"] * len(HEADS)), *(fit.rows() for fit in fits.values())]
    )
    text += "\n\n" + "\n".join(fit.summary() for fit in fits.values()) + "\n"
    write_whole(options.out.with_suffix(".md"), text)
    plot(fits, options.out.with_suffix(".svg"))
    print(text)


def read_point(entry: dict[str, object]) -> Point:
    """What `asdict` made of it."""
    return Point(**{**entry, "seconds": tuple(entry["seconds"])})


def of_bundle(points: list[Point], name: str) -> list[Point]:
    """Its points, the smallest first."""
    own = [point for point in points if point.bundle == name]
    return sorted(own, key=lambda point: (point.size_px, point.rows))


def write_points(path: Path, points: list[Point]) -> None:
    """All of them, as `read_point` reads them."""
    write_whole(path, json.dumps([asdict(point) for point in points], indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write beside, then rename: figures of hours are never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def plan_step(planner: EnginePlanner, size_px: int, rows: int) -> EnginePlan:
    """The plan of a step; without guidance each picture is one row."""
    return planner.plan(UNET, Request(size_px, size_px, rows, guidance_scale=1.0))


def planned_anew(point: Point, planner: EnginePlanner) -> Point:
    """A point that was measured, beside what is planned now."""
    return replace(point, planned_bytes=plan_step(planner, point.size_px, point.rows).total_bytes + PROCESS_BYTES)


def measure(folder: Path, planner: EnginePlanner, size_px: int, rows: int, rounds: int, threads: int | None) -> Point:
    """One point, in a process of its own."""
    planned = plan_step(planner, size_px, rows)
    with (
        tempfile.TemporaryDirectory(prefix="sdc-sizes-") as logs,
        Worker(log_path=Path(logs, "worker.log")) as worker,
    ):
        done = worker.call(run_steps, str(folder), dict(planned.sizes), rounds, threads)
    weights, attention = count_macs(folder, dict(planned.sizes))
    return Point(
        bundle=folder.name,
        size_px=size_px,
        rows=rows,
        weight_macs=weights,
        attention_macs=attention,
        seconds=tuple(done.value),
        memory_bytes=done.peak_memory_bytes,
        planned_bytes=planned.total_bytes + PROCESS_BYTES,
    )


def run_steps(folder: str, sizes: dict[str, int], rounds: int, threads: int | None) -> list[float]:
    """Seconds of the steps after the first one."""
    bundle = open_bundle(Path(folder), verify=False)
    feeds = random_feeds(bundle.manifest.components[UNET], sizes)
    seconds = []
    with bundle.load_session(UNET, bundle.choose_target(TARGET), threads=threads) as session:
        session.run(feeds)
        for _ in range(rounds):
            begin = time.perf_counter()
            session.run(feeds)
            seconds.append(time.perf_counter() - begin)
    return seconds


class Fit:
    """The model of one bundle's times."""

    def __init__(self, points: list[Point]) -> None:
        from scipy.optimize import nnls  # not above: workers import this module, and their memory is measured

        self.points = points
        self.fitted = points[::2]
        relative = np.array([np.array(point.work) / point.median for point in self.fitted])
        scale = relative.max(axis=0)  # of very different sizes
        self.coefficients = nnls(relative / scale, np.ones(len(self.fitted)))[0] / scale

    def seconds(self, point: Point) -> float:
        """What the model says."""
        return float(self.coefficients @ np.array(point.work))

    def rows(self) -> str:
        """Lines of the table."""
        return "\n".join(self.row(point) for point in self.points)

    def row(self, point: Point) -> str:
        """A line of the table."""
        low, high = np.quantile(point.seconds, (0.25, 0.75))
        modelled = self.seconds(point)
        return markdown_row(
            *(point.bundle, str(point.size_px), str(point.rows), f"{point.median:.3f}", f"{low:.3f} to {high:.3f}"),
            *(f"{modelled:.3f}", f"{modelled / point.median:.2f}", "yes" if point in self.fitted else "no"),
            *(f"{point.memory_bytes / 1e6:,.0f}", f"{point.planned_bytes / 1e6:,.0f}"),
            f"{point.planned_bytes / point.memory_bytes:.2f}",
        )

    def summary(self) -> str:
        """The rates, and how far the model is off where it was not fitted."""
        fixed, weights, attention = self.coefficients
        rates = [f"{1e-9 / each:,.0f} GOP/s" if each else "not seen" for each in (weights, attention)]
        off = [abs(self.seconds(point) / point.median - 1) for point in self.points if point not in self.fitted]
        tested = f"{np.median(off):.1%} off at the median, {max(off):.1%} at most" if off else "no point tests it"
        return (
            f"{self.points[0].bundle}: fixed {fixed * 1e3:.0f} ms, weights {rates[0]}, attention {rates[1]}; {tested} "
            f"of {len(off)} points that it was not fitted to"
        )


def plot(fits: dict[str, Fit], path: Path) -> None:
    """Seconds and memory by pixels, a line for each number of rows; dashes are the model and the plan."""
    from matplotlib import pyplot

    pyplot.switch_backend("svg")
    figure, panels = pyplot.subplots(2, len(fits), figsize=(5 * len(fits), 8), squeeze=False, layout="constrained")
    for column, (name, fit) in enumerate(fits.items()):
        times, memory = panels[0][column], panels[1][column]
        for rows in sorted({point.rows for point in fit.points}):
            line = [point for point in fit.points if point.rows == rows]
            sizes = [point.size_px for point in line]
            (drawn,) = times.plot(sizes, [point.median for point in line], "o-", label=f"{rows} rows")
            times.plot(sizes, [fit.seconds(point) for point in line], "--", color=drawn.get_color())
            memory.plot(sizes, [point.memory_bytes / 1e6 for point in line], "o-", color=drawn.get_color())
            memory.plot(sizes, [point.planned_bytes / 1e6 for point in line], "--", color=drawn.get_color())
        times.set(title=f"{name}: a step", ylabel="s", xscale="log", yscale="log")
        memory.set(title=f"{name}: memory of the process", ylabel="MB", xlabel="pixels of a side", xscale="log", ylim=0)
        for panel in (times, memory):
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        times.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
