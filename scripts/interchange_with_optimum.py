"""Draws the pictures of a bundle with optimum's own pipeline, and prints how far they are from what sdc draws.

    sdc export --model tiny --precision fp32 --target ort-cpu --no-hoist --out build/tiny-classic
    python scripts/interchange_with_optimum.py draw build/tiny-classic build/drawn.npz

and then, in an environment of its own (``pip install "optimum-onnx[onnxruntime]" diffusers "torch>=2.9,<2.14"
"transformers<4.58"``; sdc is not needed there):

    python scripts/interchange_with_optimum.py compare build/tiny-classic build/drawn.npz

Both sides start from the same latents and use DDIM.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

PROMPTS = ("a photo of a red sneaker on a white background", "a photo of a blue bag on a black background")
NEGATIVE_PROMPT = "a photo of a boot"


def main() -> None:
    """Choose the side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("draw", "compare"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pictures", type=Path, help="an .npz file; `draw` writes it and `compare` reads it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    if options.side == "draw":
        draw(options.bundle, options.pictures, steps=options.steps, guidance=options.guidance, seed=options.seed)
    else:
        compare(options.bundle, options.pictures)


def draw(bundle: Path, pictures: Path, *, steps: int, guidance: float, seed: int) -> None:
    """Draw with sdc; prompts, settings and latents go into the file, too."""
    from sdc.engines import load
    from sdc.engines.noise import noise_from_seeds

    with load(bundle, target="ort-cpu") as pipeline:
        generation = pipeline.plan(
            list(PROMPTS),
            NEGATIVE_PROMPT,
            sampler="ddim",
            steps=steps,
            guidance_scale=guidance,
            seed=seed,
        )
        settings = pipeline.settings
        size = (generation.height_px // settings.vae_reduction, generation.width_px // settings.vae_reduction)
        latents = noise_from_seeds(generation.seeds)((len(generation), settings.latent_channels, *size))
        drawn = np.clip(pipeline.decode(pipeline.denoise(generation)) / 2 + 0.5, 0, 1)
    np.savez(pictures, drawn=drawn, latents=latents, prompts=PROMPTS, steps=steps, guidance=guidance)


def compare(bundle: Path, pictures: Path) -> None:
    """Draw with optimum, and print the PSNR of every picture, in dB for values from 0 to 1."""
    import torch
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    theirs = ORTStableDiffusionPipeline.from_pretrained(bundle, export=False)
    theirs.set_progress_bar_config(disable=True)
    given = np.load(pictures)
    prompts = [str(prompt) for prompt in given["prompts"]]
    _, _, height, width = given["drawn"].shape
    found = theirs(
        prompts,
        negative_prompt=[NEGATIVE_PROMPT] * len(prompts),
        num_inference_steps=int(given["steps"]),
        guidance_scale=float(given["guidance"]),
        latents=torch.from_numpy(given["latents"]),
        height=height,
        width=width,
        output_type="np",
    ).images.transpose(0, 3, 1, 2)
    print("| prompt | PSNR | largest difference, of 255 |\n|---|---|---|")
    for prompt, ours, other in zip(prompts, given["drawn"].astype(np.float64), found, strict=True):
        error = float(np.mean((ours - other) ** 2))
        psnr = "equal" if error == 0 else f"{-10 * np.log10(error):.1f} dB"
        print(f"| {prompt} | {psnr} | {np.abs(np.rint(255 * ours) - np.rint(255 * other)).max():.0f} |")


if __name__ == "__main__":
    main()
