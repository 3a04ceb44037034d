"""What LoRAs do together: `tiny` with its style LoRA (stripes), with tiny-lcm, and with both, as a Markdown table.

    python scripts/lora_table.py --data /usr/share/datasets/fashion-mnist --out build/loras --samples 500

Stripes are measured in the pixels (`stripe_contrast`), garments and colours by the judge, who never saw a stripe: what
it makes of real pictures with stripes, before and after the autoencoder, are the first rows. Every row has the same
prompts and seeds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sdc.compiler.compile import export_bundle
from sdc.compiler.evaluate.frechet import Gaussian, frechet_distance
from sdc.compiler.evaluate.opened import opened
from sdc.compiler.evaluate.settings import JUDGED_MODEL, Settings, prompt_triples, prompts_of_triples
from sdc.compiler.evaluate.statistics import MODELS_FOLDER, balanced_triples
from sdc.compiler.evaluate.verdicts import agreement, load_judge
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.load import load_checkpoint
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import Source
from sdc.compiler.text_table import markdown_row
from sdc.compiler.tiny.data import load_grey_pictures, render
from sdc.compiler.tiny.judge import Judge
from sdc.compiler.tiny.stripes import paint_stripes, stripe_contrast
from sdc.engines.targets import parse_targets

HEADINGS = ("pictures", "stripe contrast", "garment, %", "colour, %", "Fréchet to plain", "Fréchet to striped")
STYLE, FEW_STEPS = "tiny-stripes", "tiny-lcm"


@dataclass(frozen=True)
class Pictures:
    """Some pictures and what they should show.

    Attributes:
        name: as the table has it.
        pixels: [N, 3, 32, 32], float32 in [0, 1].
        triples: [N, 3], (garment, colour, background).
    """

    name: str
    pixels: np.ndarray
    triples: np.ndarray


@dataclass(frozen=True)
class Row:
    """One way to draw."""

    loras: tuple[str, ...]
    sampler: str
    steps: int
    guidance: float

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{' and '.join(self.loras) or 'no LoRA'}, {self.sampler.upper()} in {self.steps} steps"


def main() -> None:
    """Export every set of LoRAs, draw every row, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the gzipped files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, required=True, help="folder for the bundles")
    parser.add_argument("--samples", type=int, default=500, help="pictures of each row")
    parser.add_argument("--guidance", type=float, default=1.9, help="of DDIM; LCM has none")
    parser.add_argument("--style", default=STYLE, metavar="FILE[:SCALE]")
    parser.add_argument("--few-steps", default=FEW_STEPS, metavar="FILE[:SCALE]")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    judge = load_judge(MODELS_FOLDER / "judge.safetensors")
    plain, striped = real_pictures(options.data)
    references = [Gaussian.fit(features(judge, each)) for each in (plain, striped)]
    style, few = options.style, options.few_steps
    rows = [
        Row((), "ddim", 20, options.guidance),
        Row((style,), "ddim", 20, options.guidance),
        *(Row((few,), "lcm", steps, 1.0) for steps in (4, 2)),
        *(Row((style, few), "lcm", steps, 1.0) for steps in (4, 2)),
        Row((style,), "lcm", 4, options.guidance),
    ]
    print(markdown_row(*HEADINGS), markdown_row(*["---"] * len(HEADINGS)), sep="\n")
    some = [first(each, options.samples) for each in (plain, striped)]
    for each in (*some, *map(reconstructed, some)):
        print_row(judge, references, each)
    for row in rows:
        settings = Settings(options.samples, 0, row.sampler, row.steps, row.guidance, threads=options.threads)
        print_row(judge, references, draw(row, export(options.out, row.loras), settings))


def real_pictures(folder: Path) -> tuple[Pictures, Pictures]:
    """The test pictures, plain and with stripes."""
    test = load_grey_pictures(folder, "t10k")
    triples = balanced_triples(test.garments, seed=0)
    plain, striped = (render(each, *triples[:, 1:].T) for each in (test.pixels, paint_stripes(test.pixels)))
    return (
        Pictures("real, plain", (plain / 2 + 0.5).numpy(), triples),
        Pictures("real, striped", (striped / 2 + 0.5).numpy(), triples),
    )


def first(pictures: Pictures, count: int) -> Pictures:
    """As many of them."""
    return replace(pictures, pixels=pictures.pixels[:count], triples=pictures.triples[:count])


@torch.no_grad()
def reconstructed(pictures: Pictures) -> Pictures:
    """What the autoencoder makes of them: no picture of the UNet can be nearer."""
    vae = load_checkpoint(JUDGED_MODEL).vae()
    parts = torch.from_numpy(2 * pictures.pixels - 1).split(100)
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in parts])
    pixels = (decoded / 2 + 0.5).clamp(0, 1).numpy()
    return replace(pictures, name=f"{pictures.name}, after the autoencoder", pixels=pixels)


def export(folder: Path, loras: tuple[str, ...]) -> Path:
    """A bundle of `tiny` in float32 for the CPU."""
    out = folder / ("-".join(Path(lora).stem for lora in loras) or "plain")
    source = Source(JUDGED_MODEL, loras=loras)
    export_bundle(ExportRequest(source, PrecisionRequest("fp32"), parse_targets("cpu"), out))
    return out


def draw(row: Row, bundle: Path, settings: Settings) -> Pictures:
    """The pictures of a row."""
    triples = prompt_triples(settings.samples)
    prompts, seeds = prompts_of_triples(triples), settings.picture_seeds()
    with opened(bundle, settings) as made:
        batch = made.largest_batch()
        parts = [
            made.make_pictures(prompts[begin : begin + batch], seeds[begin : begin + batch])
            for begin in range(0, len(prompts), batch)
        ]
    return Pictures(row.name, np.concatenate(parts), triples)


def features(judge: Judge, pictures: Pictures) -> np.ndarray:
    """[N, 64]."""
    found: np.ndarray = judge.judge(torch.from_numpy(2 * pictures.pixels - 1)).features.numpy()
    return found


def print_row(judge: Judge, references: list[Gaussian], pictures: Pictures) -> None:
    """All figures of some pictures; ± is the standard error over pictures."""
    verdict = judge.judge(torch.from_numpy(2 * pictures.pixels - 1))
    right = agreement(verdict, pictures.triples)
    contrast = stripe_contrast(pictures.pixels, pictures.triples[:, 1], pictures.triples[:, 2])
    error = contrast.std(ddof=1) / len(contrast) ** 0.5
    seen = Gaussian.fit(verdict.features.numpy())
    print(
        markdown_row(
            pictures.name,
            f"{contrast.mean():.3f} ± {error:.3f}",
            *(f"{100 * right[:, aspect].mean():.1f}" for aspect in (0, 1)),
            *(f"{frechet_distance(seen, reference):.2f}" for reference in references),
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
