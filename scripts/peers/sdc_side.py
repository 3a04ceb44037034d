"""sdc itself: a bundle of its target `cpu`.

Options: "precision"; "model" and "weights" as for `sdc export`; "calibration_table", a file or None; "deepcache",
whether it has a shallow UNet; "way", what pictures are drawn with in place of the settings of all sides, its own number
of steps too. A LoRA that is folded in changes no engine, so LCM takes the time that it takes with one. Kernels are
switched by the environment variable SDC_KERNELS. A step has a new timestep in every call, so that what was hoisted out
of the UNet and runs once a timestep counts; what runs once a picture counts in the picture.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from peers.protocol import PICTURE, Job, Measured, Run, Work, made_folder, main, repeated
from sdc.engines.bundle import open_bundle
from sdc.engines.networks import DenoisingStep, Networks
from sdc.engines.pipeline import open_pipeline

TARGET = "cpu"
BUNDLE = "bundle"


def prepare(job: Job) -> None:
    """Export."""
    made_folder(job, bundle_name(job), lambda folder: export(job, folder))


def bundle_name(job: Job) -> str:
    """Of the folder below `made` that holds the bundle."""
    return f"sdc-{job.options['precision']}{'-deepcache' if job.options.get('deepcache') else ''}"


def export(job: Job, folder: Path) -> None:
    """`sdc export`."""
    from sdc.compiler.cli import main as main_of_sdc

    arguments = ["export", "--target", TARGET, "--out", str(folder / BUNDLE)]
    for name in ("model", "weights", "precision", "calibration_table"):
        if job.options.get(name) and not (name == "calibration_table" and job.options["precision"] != "int8"):
            arguments += [f"--{name.replace('_', '-')}", job.options[name]]
    if job.options.get("deepcache"):
        arguments.append("--deepcache")
    if main_of_sdc(arguments):
        raise RuntimeError(f"sdc {' '.join(arguments)} failed")


def open_work(job: Job) -> Work:
    """The pipeline for pictures, the bundle's networks for components."""
    path = Path(job.made) / bundle_name(job) / BUNDLE
    if job.component == PICTURE:
        return drawing(path, job)
    bundle = open_bundle(path)
    target = bundle.target(TARGET)
    networks = Networks(
        bundle.manifest.components,
        lambda component: bundle.load_session(component, target, threads=job.threads),
    )
    feeds = job.feeds(job.component)
    work = component_work(job.component, networks, feeds)
    work(1, 1)  # engines are compiled when they first run, which is a part of loading
    return work


def component_work(component: str, networks: Networks, feeds: dict[str, np.ndarray]) -> Work:
    """Calls of one component."""
    if component == "unet":
        return stepping(networks, feeds)
    runs: dict[str, Run] = {
        "text_encoder": lambda fed: networks.encode_text(fed["input_ids"]),
        "vae_decoder": lambda fed: networks.decode_latents(fed["latent_sample"]),
    }
    return repeated(runs[component], feeds)


def stepping(networks: Networks, feeds: dict[str, np.ndarray]) -> Work:
    """Steps of a prepared UNet: of one call at the given timestep, of more at others."""
    conditions = {"encoder_hidden_states": feeds["encoder_hidden_states"]}
    predict = networks.predictor(conditions, steps=1)
    timestep = float(feeds["timestep"][0])
    fresh = iter(np.arange(1, 10**6) / 1000)

    def work(calls: int, steps: int) -> Measured:
        del steps
        seconds = []
        for index in range(calls):
            at = timestep if index == 0 and calls == 1 else timestep + float(next(fresh))
            begin = time.perf_counter()
            result = predict(feeds["sample"], at)
            seconds.append(time.perf_counter() - begin)
        return Measured(seconds, result)

    return work


def drawing(path: Path, job: Job) -> Work:
    """Whole pictures as a user draws them."""
    pipeline = open_pipeline(path, TARGET, verify=True, threads=job.threads)

    def work(calls: int, steps: int) -> Measured:
        seconds = []
        for _ in range(calls):
            ends: list[tuple[float, float]] = []

            def note(step: DenoisingStep, ends: list[Any] = ends) -> None:
                ends.append((time.monotonic() - step.seconds, time.monotonic()))

            begin = time.perf_counter()
            way = {"sampler": "ddim", "steps": steps, "guidance_scale": job.picture["guidance_scale"]}
            generation = pipeline.plan(
                job.picture["prompt"],
                seed=job.picture["seed"],
                height=job.picture["size_px"],
                width=job.picture["size_px"],
                **(way | job.options.get("way", {})),
            )
            picture = pipeline.decode(pipeline.denoise(generation, on_step=note))
            seconds.append(time.perf_counter() - begin)
        return Measured(seconds, picture, ends[0])

    return work


if __name__ == "__main__":
    main(open_work, prepare)
