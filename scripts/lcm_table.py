"""What a distilled LoRA is worth: `tiny` with LCM in few steps beside DDIM, as a Markdown table.

    python scripts/lcm_table.py --lora tiny-lcm --out build/lcm                  # 1,000 pictures, 3 seeds
    python scripts/lcm_table.py --lora lora.safetensors --out build/lcm --samples 5000

Every row's pictures are made from the same prompts and seeds. Times are of whole pictures one by one, rows in turn. It
can be interrupted: figures of runs are kept in the folder and made again only if what they depend on changes.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tables.figures import HEADINGS, figure_cells, print_headings
from tables.networks import exported

from sdc.compiler.evaluate.opened import OpenedBundle, opened
from sdc.compiler.evaluate.settings import JUDGED_MODEL, Settings, prompts_of_model
from sdc.compiler.text_table import markdown_row


@dataclass(frozen=True)
class Row:
    """One way to draw: a bundle, a sampler, its steps and the guidance."""

    bundle: Path
    sampler: str
    steps: int
    guidance: float
    lora: bool

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.sampler.upper()}{' with the LoRA' if self.lora else ''}, {self.steps} steps"

    def settings(self, samples: int, threads: int | None) -> Settings:
        """Of the first seed."""
        return Settings(
            samples=samples,
            sampler=self.sampler,
            steps=self.steps,
            guidance_scale=self.guidance,
            target="cpu",
            threads=threads,
        )


def main() -> None:
    """Export both bundles, measure every row, time them in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", required=True, help="FILE[:SCALE]")
    parser.add_argument("--out", type=Path, required=True, help="folder for the bundles")
    parser.add_argument("--samples", type=int, default=1000, help="pictures of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs with different seeds")
    parser.add_argument("--guidance", type=float, default=1.9, help="of DDIM")
    parser.add_argument("--rounds", type=int, default=15, help="timed pictures of each row")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    plain, distilled = (
        exported(JUDGED_MODEL, options.out / name, loras) for name, loras in (("plain", ()), ("lcm", (options.lora,)))
    )
    rows = [
        *(Row(plain, "ddim", steps, options.guidance, lora=False) for steps in (20, 4, 2)),
        *(Row(distilled, "lcm", steps, 1.0, lora=True) for steps in (4, 2, 8, 1)),
        *(Row(plain, "lcm", steps, options.guidance, lora=False) for steps in (4, 2)),
    ]
    seconds = time_in_turn(rows, options.rounds, options.threads)
    print_headings("pictures", *HEADINGS, "ms a picture", "ratio (quartiles)")
    for place, row in enumerate(rows):
        low, median, high = np.quantile(seconds[:, place] / seconds[:, 0], (0.25, 0.5, 0.75))
        print(
            markdown_row(
                row.name,
                *figure_cells(
                    row.bundle, row.settings(options.samples, options.threads), options.seeds, options.out / "figures"
                ),
                f"{1000 * np.median(seconds[:, place]):.1f}",
                f"{median:.2f} ({low:.2f} to {high:.2f})",
            ),
            flush=True,
        )
    print(f"{options.samples} pictures, {options.seeds} seed(s); ±: standard deviation over seeds.")


def time_in_turn(rows: list[Row], rounds: int, threads: int | None) -> np.ndarray:
    """Seconds of one picture: [rounds, rows], after one round that is not counted."""
    with ExitStack() as stack:
        bundles = [stack.enter_context(opened(row.bundle, row.settings(1, threads))) for row in rows]
        seconds = np.empty((rounds + 1, len(bundles)))
        for index in range(rounds + 1):
            for place in range(len(bundles)):
                which = (index + place) % len(bundles)  # none is always the first of a round
                seconds[index, which] = picture_seconds(bundles[which])
    return seconds[1:]


def picture_seconds(bundle: OpenedBundle) -> float:
    """Of the second of two pictures: threads of the bundle before spin during the first."""
    begin = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        bundle.make_pictures(prompts_of_model(JUDGED_MODEL, 1), [0])
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
