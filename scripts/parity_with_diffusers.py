"""Draws the same pictures with diffusers and with bundles, and prints the PSNR of each pair as a Markdown table.

    sdc export --model tiny --precision fp32 --target cpu,ort-cpu --out build/tiny-fp32
    python scripts/parity_with_diffusers.py --model tiny build/tiny-fp32

The weights, prompts and seeds are the same on both sides; diffusers runs on torch in float32.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)

from sdc.compiler.evaluate.metrics import psnr
from sdc.engines import load

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
    "lcm": LCMScheduler,
}
PROMPT = "a photo of a red sneaker on a white background"


@dataclass(frozen=True)
class Case:
    """One call; `options` are those that diffusers and sdc name alike."""

    sampler: str
    steps: int
    guidance_scale: float = 5.0
    prompts: tuple[str, ...] = (PROMPT,)
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""


CASES = (
    Case("ddim", 20),
    Case("euler", 20),
    Case("dpmpp-2m", 20),
    Case("lcm", 4, guidance_scale=1.0),
    Case("ddim", 20, prompts=(PROMPT, "a blue bag", "a green coat on a black background"), note="batch 3"),
    Case("euler", 20, options={"negative_prompt": "a photo of a boot"}, note="negative prompt"),
    Case("dpmpp-2m", 20, options={"height": 48, "width": 64}, note="48×64"),
)


def main() -> None:
    """Parse the command line, draw both sides, print the table."""
    parser = argparse.ArgumentParser(description="compare bundles with diffusers, picture by picture")
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--model", default="tiny", help="tiny, or the diffusers folder that the bundles came from")
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    folder = files("sdc.compiler") / "models" / "tiny" if arguments.model == "tiny" else Path(arguments.model)
    theirs = StableDiffusionPipeline.from_pretrained(str(folder), torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    config = dict(theirs.scheduler.config)
    print("| bundle | target | sampler | steps | case | PSNR to diffusers, worst picture |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        theirs.scheduler = SCHEDULERS[case.sampler].from_config(config)
        wanted = draw_with_diffusers(theirs, case, arguments.seed)
        for bundle in arguments.bundles:
            for target in ("cpu", "ort-cpu"):
                found = draw_with_sdc(bundle, target, case, arguments.seed)
                worst = psnr(found, wanted, data_range=2).min()
                print(
                    f"| {bundle.name} | {target} | {case.sampler} | {case.steps} | {case.note} | {worst:.1f} dB |",
                    flush=True,
                )


def draw_with_diffusers(pipeline: StableDiffusionPipeline, case: Case, seed: int) -> np.ndarray:
    """[N, 3, H, W], float64 in [-1, 1]."""
    options = dict(case.options)
    if "negative_prompt" in options:  # diffusers wants as many as there are prompts
        options["negative_prompt"] = [options["negative_prompt"]] * len(case.prompts)
    pictures = pipeline(
        list(case.prompts),
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **options,
    ).images
    return np.asarray(pictures, np.float64).transpose(0, 3, 1, 2) * 2 - 1


def draw_with_sdc(bundle: Path, target: str, case: Case, seed: int) -> np.ndarray:
    """[N, 3, H, W], float64 in [-1, 1]."""
    with load(bundle, target=target) as pipeline:
        generation = pipeline.plan(
            list(case.prompts),
            sampler=case.sampler,
            steps=case.steps,
            guidance_scale=case.guidance_scale,
            seed=seed,
            **case.options,
        )
        decoded = pipeline.decode(pipeline.denoise(generation))
    return np.clip(decoded.astype(np.float64), -1, 1)


if __name__ == "__main__":
    main()
