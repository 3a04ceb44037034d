"""stable-diffusion.cpp through `stable-diffusion-cpp-python`, built here for this processor.

Options: "type" of the weights in the file that it reads, "f16" or "q8_0"; "flash" for its fused attention and "direct"
for its convolutions without im2col: neither is faster on a CPU, so no side has them.

The library draws whole pictures only. Text encoder and VAE are timed by its own log, steps by its progress callback, a
step being two calls of the UNet, with the prompt and without. What a network computes is not given out: there is no
error. A component's memory is that of the whole.
"""

from __future__ import annotations

import ctypes
import re
import time
from pathlib import Path
from typing import Any

import stable_diffusion_cpp

from peers.protocol import PICTURE, Job, Measured, Work, made_folder, main

LOGGED = {"text_encoder": "get_learned_condition completed", "vae_decoder": "decode_first_stage completed"}
log_lines: list[str] = []


@stable_diffusion_cpp.sd_log_callback
def keep_line(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """The library's log; it must not be freed as long as the library runs."""
    del level, data
    log_lines.append(text.decode(errors="replace"))


def prepare(job: Job) -> None:
    """One file of all weights in the type of the side."""
    made_folder(job, f"sdcpp-{job.options['type']}", lambda folder: convert(job, folder))


def convert(job: Job, folder: Path) -> None:
    """The library's own converter reads a diffusers folder."""
    path = folder / "model.gguf"
    converted = stable_diffusion_cpp.StableDiffusion().convert(
        input_path=job.checkpoint, output_path=str(path), output_type=job.options["type"]
    )
    if not converted or not path.exists():
        raise RuntimeError("stable-diffusion.cpp did not convert the checkpoint; see the log")


def open_work(job: Job) -> Work:
    """The whole model, whatever the component."""
    model = stable_diffusion_cpp.StableDiffusion(
        model_path=str(Path(job.made) / f"sdcpp-{job.options['type']}" / "model.gguf"),
        vae_decode_only=True,
        n_threads=job.threads,
        rng_type="cpu",
        sampler_rng_type="cpu",
        diffusion_flash_attn=bool(job.options.get("flash")),
        diffusion_conv_direct=bool(job.options.get("direct")),
        vae_conv_direct=bool(job.options.get("direct")),
        verbose=False,
    )
    stable_diffusion_cpp.sd_set_log_callback(keep_line, ctypes.c_void_p(0))

    def work(calls: int, steps: int) -> Measured:
        if job.component == "unet":
            return Measured(draw(model, job, calls)["steps"])
        drawn = [draw(model, job, steps if job.component == PICTURE else 1) for _ in range(calls)]
        return Measured([each[job.component] for each in drawn], first_step=drawn[-1]["first_step"])

    return work


def draw(model: stable_diffusion_cpp.StableDiffusion, job: Job, steps: int) -> dict[str, Any]:
    """Draw a picture; the seconds of its parts by component, of its steps, and when the first step was."""
    ends: list[float] = []
    log_lines.clear()

    def note(step: int, of: int, seconds: float) -> None:
        if of == steps and step >= 1:
            ends.append(time.monotonic() if step == len(ends) + 1 else ends[-1])
            durations.append(seconds)

    durations: list[float] = []
    begin = time.monotonic()
    size = job.picture["size_px"]
    model.generate_image(
        prompt=job.picture["prompt"],
        cfg_scale=job.picture["guidance_scale"],
        sample_method="euler",
        sample_steps=steps,
        seed=job.picture["seed"],
        width=size,
        height=size,
        progress_callback=note,
    )
    end = time.monotonic()
    found = {component: logged_seconds(log_lines, words) for component, words in LOGGED.items()}
    sampling_began = begin + found["text_encoder"]
    between = [after - before for before, after in zip([sampling_began, *ends], ends, strict=False)]
    steps_seconds = durations if len(durations) == steps else between
    return {
        **found,
        PICTURE: end - begin,
        "steps": steps_seconds,
        "first_step": (ends[0] - steps_seconds[0], ends[0]) if ends else None,
    }


def logged_seconds(lines: list[str], words: str) -> float:
    """A time that the library logs, in ms or s.

    Raises:
        RuntimeError: it logged none.
    """
    for line in reversed(lines):
        found = re.search(rf"{re.escape(words)}, taking ([\d.]+) ?(m?s)", line)
        if found:
            return float(found[1]) / (1000 if found[2] == "ms" else 1)
    raise RuntimeError(f"stable-diffusion.cpp logged no {words!r}; its last lines: {lines[-5:]}")


if __name__ == "__main__":
    main(open_work, prepare)
