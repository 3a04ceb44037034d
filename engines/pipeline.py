"""Text to picture: tokenizer, text encoder, sampler around the UNet, VAE decoder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdc.engines.bundle import open_bundle
from sdc.engines.denoise import DENOISERS, Latents, Predict, embed_guidance, guide
from sdc.engines.errors import BundleError
from sdc.engines.generation import (
    Generation,
    check_generation,
    match_negative_prompts,
    match_seeds,
    repeat_prompts,
    takes_two_batches,
)
from sdc.engines.load_ahead import loads_unet_ahead
from sdc.engines.manifest import PipelineSettings
from sdc.engines.measures import NO_MEASURES, Measures
from sdc.engines.networks import Networks, OnStep
from sdc.engines.noise import noise_from_seeds, noise_of_rows
from sdc.engines.picture import images_from_pixels, pixels_from_decoded
from sdc.engines.preset import Preset
from sdc.engines.samplers import find_sampler
from sdc.engines.schedule import Schedule, Trajectory
from sdc.engines.schedule_config import read_schedule
from sdc.engines.session import Session
from sdc.engines.specs import SHALLOW, ComponentSpec
from sdc.engines.tokenizer import ClipTokenizer, load_tokenizer

log = logging.getLogger(__name__)

_LCM_GUIDANCE = 2.0
"""The largest that LCM-LoRAs are drawn with. Source: diffusers' guide to LCM-LoRA (arXiv:2311.05556)."""

NEEDED = ("text_encoder", "unet", "vae_decoder")
"""Components that make a picture from text."""


class Pipeline:
    """A text-to-image pipeline over loaded engines; close it, or use it as a context manager.

    Engines are loaded when they are first needed. Not thread-safe.

    Args:
        tokenizer: prompts to token ids.
        schedule: the model's noise schedule.
        settings: what the manifest says of the pipeline.
        specs: the interface of every component.
        load_session: loads the engine of a component.
        keep_loaded: whether engines stay loaded; if not, each stage of a picture releases those of the one before.
        load_ahead: whether the UNet is loaded while the text encoder is loaded and runs; `load_session` is then called
            in another thread too.
        provenance: JSON values that go into every picture's parameters; "model" is shown in their text form.
        preset: what `sdc run` draws with unless it is told otherwise; calls take what they are given.
    """

    def __init__(
        self,
        *,
        tokenizer: ClipTokenizer,
        schedule: Schedule,
        settings: PipelineSettings,
        specs: Mapping[str, ComponentSpec],
        load_session: Callable[[str], Session],
        keep_loaded: bool = True,
        load_ahead: bool = False,
        provenance: Mapping[str, str] | None = None,
        preset: Preset | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.settings = settings
        self.provenance = {"model": "unknown", **(provenance or {})}
        self.preset = preset
        self.networks = Networks(specs, load_session)
        self._keep_loaded = keep_loaded
        self._load_ahead = load_ahead

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        *,
        sampler: str = "ddim",
        steps: int | None = None,
        guidance_scale: float = 5.0,
        seed: int | Sequence[int] | None = None,
        batch: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        guidance_steps: tuple[int, int] | None = None,
        deepcache: int | Sequence[int] = 1,
        deepcache_center: int | None = None,
        measures: Measures = NO_MEASURES,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Draw pictures; the arguments are those of `plan`, and `on_step` is called after every step.

        Raises:
            InputError: an argument is outside what the bundle takes.
            NumericalError: an engine gave NaN or infinity.
        """
        generation = self.plan(
            prompt,
            negative_prompt,
            sampler=sampler,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            batch=batch,
            height=height,
            width=width,
            eta=eta,
            guidance_steps=guidance_steps,
            deepcache=deepcache,
            deepcache_center=deepcache_center,
            measures=measures,
        )
        return self.draw(generation, on_step=on_step)

    def plan(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        *,
        sampler: str = "ddim",
        steps: int | None = None,
        guidance_scale: float = 5.0,
        seed: int | Sequence[int] | None = None,
        batch: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        guidance_steps: tuple[int, int] | None = None,
        deepcache: int | Sequence[int] = 1,
        deepcache_center: int | None = None,
        measures: Measures = NO_MEASURES,
    ) -> Generation:
        """Check the choices of a call and complete them, without loading an engine.

        Args:
            prompt: one, or one for each of several pictures.
            negative_prompt: what guidance leads away from; one, or one for each prompt.
            sampler: "ddim", "lcm", "euler" or "dpmpp-2m".
            steps: denoising steps; the sampler's usual number when missing.
            guidance_scale: weight of classifier-free guidance; up to 1 there is none.
            seed: one whose noise fills the whole batch, or one for each picture; random when missing.
            batch: pictures for each prompt.
            height: in pixels; the model's own when missing; likewise `width`.
            eta: new noise at each step, from 0 to 1; DDIM only.
            guidance_steps: guide from this step up to, not including, that one, from 0; the others need half of the
                UNet's work. Every step when missing.
            deepcache: run the whole UNet at every so many steps only, or at just these, from 0; between, a shallow one
                with its deep features.
            deepcache_center: the step around which the whole UNet runs more often; evenly when missing.
            measures: what to do to take less memory; nothing when missing.

        Raises:
            InputError: an argument is outside what the bundle takes.
        """
        prompts = repeat_prompts(prompt, batch)
        count = find_sampler(sampler).default_steps if steps is None else steps
        if guidance_steps is not None:
            begin, end = guidance_steps
            guidance_steps = None if (begin, end) == (0, count) else (begin, end)
        generation = Generation(
            prompts=prompts,
            negative_prompts=match_negative_prompts(negative_prompt, len(prompts)),
            sampler=sampler,
            steps=count,
            guidance_scale=float(guidance_scale),
            seeds=match_seeds(seed, len(prompts)),
            height_px=self.settings.default_height_px if height is None else height,
            width_px=self.settings.default_width_px if width is None else width,
            eta=eta,
            guidance_steps=guidance_steps,
            deepcache=deepcache if isinstance(deepcache, int) else tuple(deepcache),
            deepcache_center=deepcache_center,
            measures=measures,
        )
        check_generation(generation, self.schedule, self.settings, self.networks.specs)
        if sampler == "lcm" and guidance_scale > _LCM_GUIDANCE and takes_two_batches(guidance_scale, self.settings):
            log.warning(
                "guidance %g spoils pictures of LCM, whose LoRA has learnt its guidance: use 1 to 2", guidance_scale
            )
        if any(generation.negative_prompts) and not takes_two_batches(guidance_scale, self.settings):
            log.warning("the negative prompt has no effect: there is no unconditional prediction to replace")
        return generation

    def draw(self, generation: Generation, *, on_step: OnStep | None = None) -> list[Image.Image]:
        """The pictures of a generation, with its parameters in their ``info``."""
        decoded = self.decode(self.denoise(generation, on_step=on_step), measures=generation.measures)
        self._leave_only()
        pixels = np.concatenate([pixels_from_decoded(picture) for picture in np.split(decoded, len(decoded))])
        parameters = [{**generation.parameters(index), **self.provenance} for index in range(len(generation))]
        return images_from_pixels(pixels, parameters)

    def encode(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """The text encoder's last hidden states, [len(prompts), max_tokens, D], float32; equal prompts run once."""
        distinct = list(dict.fromkeys(prompts))
        states = self.networks.encode_text(self.tokenizer.encode(distinct))
        return states[[distinct.index(prompt) for prompt in prompts]]

    def encode_prompts(self, generation: Generation) -> NDArray[np.float32]:
        """`encode` of a generation's prompts, behind its negative prompts where guidance needs both."""
        guided = takes_two_batches(generation.guidance_scale, self.settings)
        return self.encode((*(generation.negative_prompts if guided else ()), *generation.prompts))

    def denoise(
        self, generation: Generation, *, on_step: OnStep | None = None, trajectory: Trajectory | None = None
    ) -> Latents:
        """Run the sampler, on one group of pictures after the other.

        Args:
            generation: what to draw.
            on_step: called after every step.
            trajectory: levels to go through; the sampler's own if None.

        Returns:
            [N, C, H/F, W/F], float32: clean latents in the UNet's scale; `decode` takes them.
        """
        settings = self.settings
        sampler = find_sampler(generation.sampler, eta=generation.eta)
        trajectory = trajectory or sampler.plan(self.schedule, generation.steps)
        denoiser = DENOISERS[self.schedule.prediction_type]
        latent_size = (generation.height_px // settings.vae_reduction, generation.width_px // settings.vae_reduction)
        states = self._encode_beside_unet(generation, latent_size)
        predictors = self._predictors(generation, states, [now.timestep for now, _ in trajectory.transitions], on_step)
        made = []
        for rows, predict in zip(generation.groups, predictors, strict=True):
            # Noise does not depend on the groups: each takes its rows of the same stream.
            draw_noise = noise_of_rows(noise_from_seeds(generation.seeds), rows, len(generation))
            x = draw_noise((rows.stop - rows.start, settings.latent_channels, *latent_size))
            x = x * np.float32(trajectory.start_scale)
            made.append(sampler.sample(denoiser(predict), x, trajectory.transitions, draw_noise))
        return np.concatenate(made)

    def decode(self, latents: Latents, *, measures: Measures = NO_MEASURES) -> NDArray[np.float32]:
        """The VAE decoder's pictures, [N, 3, H, W], float32, -1 for black to 1 for white and a little beyond."""
        settings = self.settings
        scaled = latents / settings.vae_scaling_factor + settings.vae_shift_factor
        scale, tile = settings.vae_reduction, measures.tile_px
        self._leave_only("vae_decoder")
        return self.networks.decode_latents(
            scaled,
            at_once=measures.decoded_at_once,
            tile=None if tile is None else (tile[0] // scale, tile[1] // scale),
            scale=scale,
        )

    def close(self) -> None:
        """Release all engines; may be called twice. They are loaded again if they are needed again."""
        self.networks.release()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _encode_beside_unet(self, generation: Generation, latent_size: tuple[int, int]) -> NDArray[np.float32]:
        """`encode_prompts`, while the UNet is loaded, if it is loaded ahead.

        If engines are released, the backend packs the UNet's weights once the text encoder is gone.
        """
        try:
            if self._load_ahead:
                samples = self._sample_shapes(generation, latent_size)
                self.networks.load_unet_ahead(samples, waits=not self._keep_loaded)
            states = self.encode_prompts(generation)
        except BaseException:
            self.networks.give_up_waiting()
            raise
        self._leave_only("unet", SHALLOW)
        return states

    def _sample_shapes(self, generation: Generation, latent_size: tuple[int, int]) -> set[tuple[int, ...]]:
        """Of all samples that the UNet gets."""
        guided = takes_two_batches(generation.guidance_scale, self.settings)
        pictures = {rows.stop - rows.start for rows in generation.groups}
        rows = {2 * count for count in pictures} if guided else pictures
        if generation.guidance_steps is not None:
            rows |= pictures
        return {(count, self.settings.latent_channels, *latent_size) for count in rows}

    def _predictors(
        self,
        generation: Generation,
        states: NDArray[np.float32],
        timesteps: Sequence[float],
        on_step: OnStep | None,
    ) -> list[Predict]:
        """For each group of pictures the UNet with its conditions, from `encode_prompts`, and guidance around it."""
        guided = takes_two_batches(generation.guidance_scale, self.settings)
        width = self.settings.time_cond_proj_dim
        interval = generation.guidance_steps
        predictors = []
        for rows in generation.groups:
            pictures = rows.stop - rows.start
            halves = np.split(states, 2) if guided else [states]
            conditions = {"encoder_hidden_states": np.concatenate([half[rows] for half in halves])}
            if width is not None:
                conditions["timestep_cond"] = embed_guidance(generation.guidance_scale, rows=pictures, width=width)
            predict = self.networks.predictor(
                conditions,
                steps=generation.steps,
                timesteps=timesteps,
                fewer_rows=None if interval is None else pictures,
                full_steps=generation.full_steps,
                on_step=on_step,
            )
            if guided:
                predict = guide(predict, generation.guidance_scale, None if interval is None else range(*interval))
            predictors.append(predict)
        self._leave_only("unet", SHALLOW)  # what runs once for a picture has run
        return predictors

    def _leave_only(self, *components: str) -> None:
        """Before a stage of a picture, release the engines of those before it."""
        if not self._keep_loaded:
            self.networks.release(but=components)


def open_pipeline(
    path: str | os.PathLike[str],
    target: str | None,
    *,
    verify: bool,
    threads: int | None,
    keep_loaded: bool = True,
    prefetch: bool = True,
) -> Pipeline:
    """See `sdc.engines.load`."""
    bundle = open_bundle(Path(path), verify=verify)
    manifest = bundle.manifest
    missing = [component for component in NEEDED if component not in manifest.components]
    if missing:
        raise BundleError(f"the bundle {bundle.path} has no {', '.join(missing)}", hint="export the whole model")
    chosen = bundle.choose_target(target)
    return Pipeline(
        tokenizer=load_tokenizer(bundle.path / "tokenizer", max_tokens=manifest.pipeline.max_tokens),
        schedule=read_schedule(bundle.path / "scheduler" / "scheduler_config.json"),
        settings=manifest.pipeline,
        specs=manifest.components,
        load_session=lambda component: bundle.load_session(component, chosen, threads=threads, prefetch=prefetch),
        keep_loaded=keep_loaded,
        load_ahead=loads_unet_ahead(chosen.backend, prefetch=prefetch),
        provenance={
            "model": manifest.model.name,
            "precision": manifest.precision,
            "target": chosen.name,
            "sdc_version": manifest.sdc_version,
        },
        preset=manifest.preset,
    )
