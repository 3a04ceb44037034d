"""What to draw: every choice of one call, checked against what the engines can take before any of them is loaded."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdc.engines.deepcache import CacheSchedule, full_steps
from sdc.engines.errors import InputError
from sdc.engines.manifest import PipelineSettings
from sdc.engines.measures import NO_MEASURES, Measures
from sdc.engines.noise import MAXIMUM_SEED
from sdc.engines.samplers import find_sampler
from sdc.engines.schedule import Schedule
from sdc.engines.specs import SHALLOW, ComponentSpec, DimensionRange


@dataclass(frozen=True)
class Generation:
    """The pictures of one call.

    Attributes:
        prompts: one for each picture; likewise ``negative_prompts``.
        sampler: a key of ``SAMPLERS``.
        steps: denoising steps.
        guidance_scale: weight of classifier-free guidance; up to 1 there is none.
        seeds: one for the whole batch, or one for each picture.
        height_px: size of the pictures; likewise ``width_px``.
        eta: new noise at each step of DDIM, from 0 to 1.
        guidance_steps: the first step that is guided, and the first one after it that is not; None guides all.
        deepcache: steps for each run of the whole UNet, 1 running it at each, or the very steps at which it runs.
            ``deepcache_center``: see `full_steps`.
        measures: what is done to take less memory.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    sampler: str
    steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    height_px: int
    width_px: int
    eta: float = 0.0
    guidance_steps: tuple[int, int] | None = None
    deepcache: CacheSchedule = 1
    deepcache_center: int | None = None
    measures: Measures = NO_MEASURES

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def full_steps(self) -> frozenset[int] | None:
        """The steps at which the whole UNet runs; None without DeepCache.

        The first one with guidance is among them: the unconditional half has no deep features before.
        """
        if self.deepcache == 1 and self.deepcache_center is None:
            return None
        found = full_steps(self.steps, self.deepcache, self.deepcache_center)
        return found if self.guidance_steps is None else found | {self.guidance_steps[0]}

    @property
    def groups(self) -> tuple[slice, ...]:
        """The pictures that are denoised together, one group after the other."""
        most = self.measures.pictures_at_once or len(self)
        return tuple(slice(begin, min(begin + most, len(self))) for begin in range(0, len(self), most))

    def parameters(self, index: int) -> dict[str, Any]:
        """What made picture `index`, as JSON values; together with the bundle they make it again."""
        return {
            "prompt": self.prompts[index],
            "negative_prompt": self.negative_prompts[index],
            "sampler": self.sampler,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seeds[index] if len(self.seeds) > 1 else self.seeds[0],
            "width": self.width_px,
            "height": self.height_px,
            "eta": self.eta,
            "guidance_steps": self.guidance_steps,
            "deepcache": self.deepcache,
            "deepcache_center": self.deepcache_center,
            "index": index if len(self.seeds) == 1 else 0,
            "batch": len(self) if len(self.seeds) == 1 else 1,
            "measures": self.measures.to_json(),
        }


def repeat_prompts(prompt: str | Sequence[str], batch: int) -> tuple[str, ...]:
    """Every prompt `batch` times, one after the other."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise InputError("the list of prompts is empty")
    if batch < 1:
        raise InputError(f"batch {batch} was asked for", hint="choose at least 1")
    return tuple(each for each in prompts for _ in range(batch))


def match_negative_prompts(negative_prompt: str | Sequence[str], pictures: int) -> tuple[str, ...]:
    """One negative prompt for each picture: a single one serves all, several are dealt out evenly."""
    negative = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
    if not negative or pictures % len(negative):
        raise InputError(
            f"{len(negative)} negative prompts were given for {pictures} pictures",
            hint="give one, or one for each prompt",
        )
    return tuple(each for each in negative for _ in range(pictures // len(negative)))


def match_seeds(seed: int | Sequence[int] | None, pictures: int) -> tuple[int, ...]:
    """The seeds to use; without one, a random seed of 32 bits."""
    if seed is None:
        return (secrets.randbits(32),)
    seeds = (seed,) if isinstance(seed, int) else tuple(seed)
    if len(seeds) not in (1, pictures):
        raise InputError(f"{len(seeds)} seeds were given for {pictures} pictures", hint="give one, or one each")
    for each in seeds:
        if not 0 <= each <= MAXIMUM_SEED:
            raise InputError(f"seed {each} is outside 0 to 2**64 - 1")
    return seeds


def takes_two_batches(guidance_scale: float, settings: PipelineSettings) -> bool:
    """Whether guidance needs the unconditional prediction: not up to 1, and not if the UNet takes it as an input."""
    return guidance_scale > 1 and settings.time_cond_proj_dim is None


def check_generation(
    generation: Generation, schedule: Schedule, settings: PipelineSettings, specs: Mapping[str, ComponentSpec]
) -> None:
    """Check a generation against the schedule and the engines' ranges.

    Raises:
        InputError: the sampler is unknown, or a number is outside what the bundle takes; the message names the range.
    """
    find_sampler(generation.sampler, eta=generation.eta).plan(schedule, generation.steps)
    if generation.full_steps is not None and SHALLOW not in specs:
        raise InputError(
            f"deepcache {generation.deepcache} was asked for, and the bundle has no shallow UNet",
            hint="export it with --deepcache",
        )
    if generation.guidance_steps is not None:
        _check_guidance_steps(generation, generation.guidance_steps, settings)
    check_measures(generation.measures, settings, specs)
    check_pictures(
        max(group.stop - group.start for group in generation.groups),
        guidance_scale=generation.guidance_scale,
        height_px=generation.height_px,
        width_px=generation.width_px,
        settings=settings,
        specs=specs,
    )


def check_measures(measures: Measures, settings: PipelineSettings, specs: Mapping[str, ComponentSpec]) -> None:
    """Check measures against the engines' ranges.

    Raises:
        InputError: pictures are to be drawn none at a time, or tiles are of a size that the decoder does not take.
    """
    for name, value in (("denoised", measures.pictures_at_once), ("decoded", measures.decoded_at_once)):
        if value is not None and value < 1:
            raise InputError(f"{value} pictures are to be {name} at once", hint="choose at least 1")
    if measures.tile_px is not None:
        _check_sizes("vae_decoder", "latent_sample", measures.tile_px, settings, specs, of="tile ")


def check_pictures(
    pictures: int,
    *,
    guidance_scale: float,
    height_px: int,
    width_px: int,
    settings: PipelineSettings,
    specs: Mapping[str, ComponentSpec],
) -> None:
    """Check how many pictures are asked for at once, and their size, against the engines' ranges.

    Raises:
        InputError: a number is outside what the bundle takes; the message names the range.
    """
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance {guidance_scale} is not a finite number")
    for component, tensor in (("unet", "sample"), ("vae_decoder", "latent_sample")):
        _check_sizes(component, tensor, (height_px, width_px), settings, specs)
    doubled = 2 if takes_two_batches(guidance_scale, settings) else 1
    allowed = allowed_sizes(specs["unet"], "sample", 0)
    if not allowed.minimum <= doubled * pictures <= allowed.maximum:
        most = allowed.maximum // doubled
        raise InputError(
            f"{pictures} pictures at guidance {guidance_scale} need {doubled * pictures} rows "
            f"of the UNet, which takes {allowed.minimum} to {allowed.maximum}",
            hint=f"ask for at most {most} at a time" if most else "use guidance 1",
        )


def _check_guidance_steps(generation: Generation, asked: tuple[int, int], settings: PipelineSettings) -> None:
    begin, end = asked
    if not 0 <= begin < end <= generation.steps:
        raise InputError(
            f"guidance at the steps {begin}:{end} was asked for; there are {generation.steps}",
            hint=f"choose FIRST:END with 0 <= FIRST < END <= {generation.steps}",
        )
    if not takes_two_batches(generation.guidance_scale, settings):
        raise InputError(
            f"guidance at the steps {begin}:{end} was asked for, and there is none to limit",
            hint="choose a guidance above 1; a UNet that takes guidance as an input has it at every step",
        )


def _check_sizes(
    component: str,
    tensor: str,
    sizes_px: tuple[int, int],
    settings: PipelineSettings,
    specs: Mapping[str, ComponentSpec],
    *,
    of: str = "",
) -> None:
    for axis, name, size in ((2, "height", sizes_px[0]), (3, "width", sizes_px[1])):
        _check_size(f"{of}{name}", size, allowed_sizes(specs[component], tensor, axis), settings.vae_reduction)


def _check_size(name: str, size_px: int, latent: DimensionRange, reduction: int) -> None:
    least, most, multiple = (reduction * each for each in (latent.minimum, latent.maximum, latent.multiple))
    if size_px % multiple or not least <= size_px <= most:
        allowed = f"{least}" if least == most else f"{least} to {most} in steps of {multiple}"
        raise InputError(f"{name} {size_px} px is not possible with this bundle", hint=f"choose {allowed} px")


def allowed_sizes(spec: ComponentSpec, tensor: str, axis: int) -> DimensionRange:
    """The sizes that an axis of an input may have."""
    shape = next(each.shape for each in spec.inputs if each.name == tensor)
    size = shape[axis]
    return spec.dimensions[size] if isinstance(size, str) else DimensionRange(size, size, size)


def largest_batch(spec: ComponentSpec) -> int:
    """Most rows that a component takes at once."""
    return allowed_sizes(spec, spec.inputs[0].name, 0).maximum
