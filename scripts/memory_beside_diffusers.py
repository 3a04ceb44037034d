"""Memory of one picture: diffusers in float32, and bundles of the same model, each in a process of its own.

    python scripts/save_checkpoint.py --model sd15 --weights random build/sd15-folder
    python scripts/memory_beside_diffusers.py build/sd15-folder build/sd15-fp32 build/sd15-int8 --size 768

Memory is a process's largest resident set, interpreter and libraries included. diffusers' pipeline is as it comes
(`scaled_dot_product_attention`, which keeps no scores), and with its plain attention processor, which computes as the
articles of the time of SD 1.5 do. Bundles are drawn on the target cpu: with all engines kept, which in fp32 shows what
sharing memory within engines saves alone, and with `sdc run`, which releases every engine that a picture needs no more.
All draw from the same noise; PSNR is to diffusers' picture.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from sdc.compiler.evaluate.metrics import psnr
from sdc.compiler.text_table import markdown_row

SDC = "import sys; from sdc.compiler.cli import main; sys.exit(main())"

DIFFUSERS = """
import sys
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

folder, plain, size, steps, prompt, seed, threads, out = sys.argv[1:]
torch.set_num_threads(int(threads))
options = {"torch_dtype": torch.float32, "safety_checker": None, "requires_safety_checker": False}
pipe = StableDiffusionPipeline.from_pretrained(folder, **options)
pipe.set_progress_bar_config(disable=True)
if plain == "plain":
    pipe.unet.set_attn_processor(AttnProcessor())
    pipe.vae.set_attn_processor(AttnProcessor())
(picture,) = pipe(
    prompt, height=int(size), width=int(size), num_inference_steps=int(steps), guidance_scale=5.0,
    generator=torch.Generator().manual_seed(int(seed)),
).images
picture.save(out)
"""

KEPT = """
import sys
from sdc.engines import load

bundle, size, steps, prompt, seed, threads, out = sys.argv[1:]
with load(bundle, "cpu", threads=int(threads), keep_loaded=True) as pipe:
    (picture,) = pipe(prompt, height=int(size), width=int(size), steps=int(steps), guidance_scale=5.0, seed=int(seed))
picture.save(out)
"""


def main() -> None:
    """Print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the model as a diffusers folder")
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--size", type=int, default=512, metavar="PX")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--prompt", default="a bowl of fruit on a wooden table, oil painting")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    size, steps, seed, threads = map(str, (options.size, options.steps, options.seed, options.threads))
    commands = {
        f"diffusers, fp32, {name} attention": [
            *(sys.executable, "-c", DIFFUSERS, str(options.folder), name, size, steps, options.prompt, seed, threads)
        ]
        for name in ("plain", "own")
    }
    for bundle in options.bundles:
        common = [str(bundle), size, steps, options.prompt, seed, threads]
        commands[f"{bundle.name}, engines kept"] = [sys.executable, "-c", KEPT, *common]
        drawn = ["--height", size, "--width", size, "--steps", steps, "--seed", seed, "--threads", threads]
        commands[bundle.name] = [
            *(sys.executable, "-c", SDC, "run", str(bundle), "--target", "cpu", "--prompt", options.prompt),
            *(*drawn, "--guidance", "5", "--out"),
        ]
    print(markdown_row(f"{size}x{size}", "MB", "plain diffusers' / this", "PSNR, dB", "seconds"))
    print(markdown_row(*["---"] * 5))
    first_bytes, wanted = 0, None
    with tempfile.TemporaryDirectory() as temporary:
        for name, command in commands.items():
            out = Path(temporary) / "picture.png"
            begin = time.perf_counter()
            peak = peak_bytes([*command, str(out)])
            seconds = time.perf_counter() - begin
            with Image.open(out) as image:
                picture = np.asarray(image, np.float64)[None] / 255
            first_bytes, wanted = first_bytes or peak, picture if wanted is None else wanted
            figures = f"{peak / 1e6:,.0f}", f"{first_bytes / peak:.2f}", f"{psnr(picture, wanted)[0]:.1f}"
            print(markdown_row(name, *figures, f"{seconds:.0f}"), flush=True)


def peak_bytes(command: list[str]) -> int:
    """The largest resident set of a process; it must succeed. Source: getrusage(2), ``ru_maxrss``, in KiB on Linux."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[:3])
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
