"""An opened bundle as an evaluation uses it: pictures as arrays, the bare UNet, and words for the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import sdc.engines
from sdc.compiler.evaluate.settings import Settings
from sdc.engines.bundle import open_bundle
from sdc.engines.denoise import embed_guidance
from sdc.engines.generation import Generation, largest_batch, takes_two_batches
from sdc.engines.manifest import Manifest
from sdc.engines.pipeline import Pipeline


@dataclass(frozen=True)
class OpenedBundle:
    """A bundle and its running pipeline.

    Attributes:
        path: as the user gave it.
        manifest: what the bundle says of itself.
        target: name of the target that runs.
        pipeline: makes its pictures.
        settings: how.
    """

    path: Path
    manifest: Manifest
    target: str
    pipeline: Pipeline
    settings: Settings

    def describe(self) -> dict[str, str]:
        """What is evaluated, for the report."""
        return {
            "path": str(self.path),
            "model": self.manifest.model.name,
            "precision": self.manifest.precision,
            "target": self.target,
        }

    def largest_batch(self) -> int:
        """Most pictures that can be made at once."""
        doubled = 2 if takes_two_batches(self.settings.guidance_scale, self.manifest.pipeline) else 1
        return max(1, largest_batch(self.manifest.components["unet"]) // doubled)

    def plan(self, prompts: Sequence[str], seeds: Sequence[int]) -> Generation:
        """The generation of one picture for each prompt, from its own seed."""
        return self.pipeline.plan(
            list(prompts),
            sampler=self.settings.sampler,
            steps=self.settings.steps,
            guidance_scale=self.settings.guidance_scale,
            seed=list(seeds),
            guidance_steps=self.settings.guidance_steps,
            deepcache=self.settings.deepcache,
            deepcache_center=self.settings.deepcache_center,
        )

    def make_pictures(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """Pictures [N, 3, H, W], float32 in [0, 1], not rounded to 8 bits."""
        decoded = self.pipeline.decode(self.pipeline.denoise(self.plan(prompts, seeds)))
        return np.clip(decoded / 2 + np.float32(0.5), 0, 1)

    def predict_noise(self, sample: np.ndarray, timestep: float, encoder_hidden_states: np.ndarray) -> np.ndarray:
        """The UNet's raw prediction for a sample [N, C, H, W], in as many calls as its batch needs."""
        conditions = {"encoder_hidden_states": encoder_hidden_states}
        width = self.manifest.pipeline.time_cond_proj_dim
        if width is not None:
            scale = self.settings.guidance_scale
            conditions["timestep_cond"] = embed_guidance(scale, rows=len(sample), width=width)
        return self.pipeline.networks.predict(sample, timestep, conditions)


@contextmanager
def opened(path: Path, settings: Settings) -> Iterator[OpenedBundle]:
    """Open a bundle for evaluation and close its engines afterwards.

    Raises:
        BundleError: the bundle is missing or damaged.
        TargetError: this machine cannot run the target, or the bundle does not have it.
    """
    bundle = open_bundle(path)
    target = bundle.choose_target(settings.target).name
    with sdc.engines.load(path, target, threads=settings.threads) as pipeline:
        yield OpenedBundle(path, bundle.manifest, target, pipeline, settings)
