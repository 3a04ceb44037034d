"""What calibration denoises."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sdc.compiler.component import Component
from sdc.engines.errors import InputError
from sdc.engines.manifest import PipelineSettings
from sdc.engines.specs import ComponentSpec, DimensionRange
from sdc.passes.macs import count_macs

_SMALL_MACS = 2_000_000_000
"""Multiply-adds of one picture below which a network counts as small."""


@dataclass(frozen=True)
class CalibrationSettings:
    """What to denoise.

    Attributes:
        prompts: one picture each.
        steps: of DDIM; their timesteps are spread over the whole schedule.
        guidance_scale: above 1, the empty prompt runs along, as it does in use.
        seed: noise of the first prompt; the others count up from it.
        latent_size: height and width of the latents.
        batch: prompts at a time; it changes memory and time, not the ranges.
        timesteps: how many of the steps pictures are drawn in: the noisiest and those that `choose_timesteps` finds
            from the first batch, which is drawn in all. None for all.
    """

    prompts: tuple[str, ...]
    steps: int = 20
    guidance_scale: float = 5.0
    seed: int = 0
    latent_size: tuple[int, int] = (64, 64)
    batch: int = 1
    timesteps: int | None = None

    def __post_init__(self) -> None:
        if self.timesteps is not None and self.timesteps > self.steps:
            raise InputError(
                f"--calibration-timesteps asks for {self.timesteps} of {self.steps} steps",
                hint="ask for fewer, or give more --calibration-steps",
            )
        if not self.prompts:
            raise InputError("no prompts to calibrate with", hint="give at least one")

    @property
    def runs(self) -> int:
        """Calls of the network that are recorded."""
        return (self.timesteps or self.steps) * -(-len(self.prompts) // self.batch)

    @property
    def scouting(self) -> CalibrationSettings:
        """One batch at every step, to look around with."""
        return replace(self, prompts=self.prompts[: self.batch], timesteps=None)


def chosen_settings(
    unet: Component,
    pipeline: PipelineSettings,
    prompts: tuple[str, ...],
    *,
    all_prompts: bool = False,
    steps: int | None = None,
    size_px: int | None = None,
    timesteps: int | None = None,
) -> CalibrationSettings:
    """`default_settings`, but for what the user says.

    Args:
        unet: likewise.
        pipeline: likewise.
        prompts: likewise.
        all_prompts: likewise.
        steps: of each picture; None for the default.
        size_px: height and width of the pictures; likewise.
        timesteps: how many of the steps are kept; None for all.

    Raises:
        InputError: the network does not take pictures of this size, or there are not so many steps.
    """
    settings = default_settings(unet, pipeline, prompts, all_prompts=all_prompts)
    if steps is not None:
        settings = replace(settings, steps=steps)
    settings = replace(settings, timesteps=timesteps)
    if size_px is None:
        return settings
    size = size_px // pipeline.vae_reduction
    for symbol in ("H", "W"):
        allowed = unet.spec.dimensions.get(symbol) or DimensionRange(size, size, size)
        if size_px % (pipeline.vae_reduction * allowed.multiple) or not allowed.minimum <= size <= allowed.maximum:
            smallest, largest, step = (
                each * pipeline.vae_reduction for each in (allowed.minimum, allowed.maximum, allowed.multiple)
            )
            raise InputError(
                f"pictures of {size_px} pixels are not of a size that the UNet takes",
                hint=f"give --calibration-size a multiple of {step} from {smallest} to {largest}",
            )
    return replace(settings, latent_size=(size, size))


def default_settings(
    unet: Component, pipeline: PipelineSettings, prompts: tuple[str, ...], *, all_prompts: bool = False
) -> CalibrationSettings:
    """Settings that take a minute or two on two cores, whatever the size of the network.

    A small network runs all prompts in 20 steps at the model's own size. A large one runs 4 prompts in 10 steps at
    half the size, 32x32 latents at most: what an activation ranges over depends on the timestep and the prompt far more
    than on the size of the picture.

    Args:
        unet: the network to calibrate.
        pipeline: as in the bundle's manifest.
        prompts: to choose from.
        all_prompts: a large network runs all of them too.
    """
    height, width = (
        size_px // pipeline.vae_reduction for size_px in (pipeline.default_height_px, pipeline.default_width_px)
    )
    sizes = {"B": 1, "H": height, "W": width}
    if count_macs(unet.model, sizes).total < _SMALL_MACS:
        return CalibrationSettings(prompts, latent_size=(height, width), batch=_largest_batch(unet.spec))
    reduced = (_reduced_size(unet.spec, "H", height), _reduced_size(unet.spec, "W", width))
    return CalibrationSettings(prompts if all_prompts else prompts[:4], steps=10, latent_size=reduced)


def _largest_batch(spec: ComponentSpec) -> int:
    """Prompts at a time; guidance doubles the rows."""
    allowed = spec.dimensions.get("B")
    return 1 if allowed is None else max(1, min(8, allowed.maximum // 2))


def _reduced_size(spec: ComponentSpec, symbol: str, size: int) -> int:
    """Half the size, 32 at most, as far as the component's range allows."""
    allowed = spec.dimensions.get(symbol)
    if allowed is None:
        return size
    wanted = max(min(size // 2, 32), allowed.minimum)
    return wanted - wanted % allowed.multiple or allowed.multiple
