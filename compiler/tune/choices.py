"""What a bundle can do to draw faster, axis by axis, and the way to draw that a choice on each axis comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from sdc.compiler.bundle.request_file import REQUEST_NAME, read_request
from sdc.engines.bundle import Bundle
from sdc.engines.deepcache import CacheSchedule, full_steps
from sdc.engines.generation import takes_two_batches
from sdc.engines.preset import Way
from sdc.engines.specs import SHALLOW

STEP_PARTS = (0.75, 0.5, 0.4, 0.3, 0.25, 0.2)
"""Of the reference's steps."""

FEW_STEPS = (8, 4, 2)
"""Of the sampler lcm, for which guidance is learnt and not applied."""

GUIDED_PARTS = (0.75, 0.5, 0.25)
"""Of the steps, from the first: guidance is worth least in the last ones (docs/results/steps.md)."""

INTERVALS = (2, 3, 5)
"""Of DeepCache."""

LCM = "lcm"


@dataclass(frozen=True)
class Course:
    """A sampler and its steps.

    Attributes:
        sampler: a key of ``SAMPLERS``.
        steps: denoising steps.
        guidance_scale: that it has to be drawn with; None for any.
    """

    sampler: str
    steps: int
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Caching:
    """A schedule of DeepCache: so many whole steps as evenly every `interval` ones, or as it was measured."""

    interval: int
    measured: bool = False


@dataclass(frozen=True)
class Choice:
    """A value on each axis; ``guided`` is the part of the steps with guidance, from the first."""

    course: Course
    guidance_scale: float
    guided: float
    caching: Caching

    def shortcuts(self, reference: Choice) -> tuple[Choice, ...]:
        """Each of its values alone that is not the reference's, all else as there."""
        parts = (
            replace(reference, course=self.course),
            replace(reference, guidance_scale=self.guidance_scale),
            replace(reference, guided=self.guided),
            replace(reference, caching=self.caching),
        )
        return tuple(part for part in parts if part != reference)


@dataclass(frozen=True)
class Abilities:
    """What a bundle can do beside plain drawing.

    Attributes:
        lcm: whether it has learnt to draw in few steps.
        deepcache: whether it has a shallow UNet.
        intervals: whether guidance at some steps saves work.
    """

    lcm: bool
    deepcache: bool
    intervals: bool


def abilities_of(bundle: Bundle) -> Abilities:
    """By its components, its UNet's inputs and the LoRAs that it says it was made with."""
    settings = bundle.manifest.pipeline
    loras = read_request(bundle).loras if REQUEST_NAME in bundle.manifest.files else ()
    return Abilities(
        lcm=settings.time_cond_proj_dim is not None or any(lora.few_steps for lora in loras),
        deepcache=SHALLOW in bundle.manifest.components,
        intervals=takes_two_batches(2.0, settings),
    )


WholeSteps = Callable[[Way, int], tuple[int, ...]]
"""The measured schedule of DeepCache for a way without shortcuts and a number of whole steps."""


@dataclass(frozen=True)
class Space:
    """The values on each axis, the reference's first, and what makes ways of them."""

    courses: tuple[Course, ...]
    guidance_scales: tuple[float, ...]
    guided: tuple[float, ...]
    cachings: tuple[Caching, ...]
    whole_steps: WholeSteps

    @classmethod
    def around(cls, reference: Way, abilities: Abilities, whole_steps: WholeSteps) -> Space:
        """What a bundle can do in place of a reference without shortcuts."""
        assert reference == reference.without_shortcuts()
        steps, scale = reference.steps, reference.guidance_scale
        fewer = dict.fromkeys(max(1, round(part * steps)) for part in STEP_PARTS)
        own = Course(reference.sampler, steps)
        courses = [own, *(Course(reference.sampler, count) for count in fewer if count < steps)]
        if abilities.lcm and reference.sampler != LCM:
            embedded = scale if not abilities.intervals else 1.0  # a UNet that takes guidance as an input needs it
            courses += [Course(LCM, count, embedded) for count in FEW_STEPS if count < steps]
        cachings = [Caching(interval, measured) for interval in INTERVALS for measured in (False, True)]
        return cls(
            courses=tuple(courses),
            guidance_scales=(scale, (1 + scale) / 2, 1.0) if scale > 1 and abilities.intervals else (scale,),
            guided=(1.0, *GUIDED_PARTS) if scale > 1 and abilities.intervals else (1.0,),
            cachings=(Caching(1), *(cachings if abilities.deepcache else ())),
            whole_steps=whole_steps,
        )

    @property
    def reference(self) -> Choice:
        """The first value of each axis."""
        return Choice(self.courses[0], self.guidance_scales[0], self.guided[0], self.cachings[0])

    def alone(self) -> Iterator[Choice]:
        """Every other value of every axis, all else as in the reference."""
        reference = self.reference
        yield from (replace(reference, course=course) for course in self.courses[1:])
        yield from (replace(reference, guidance_scale=scale) for scale in self.guidance_scales[1:])
        yield from (replace(reference, guided=part) for part in self.guided[1:])
        yield from (replace(reference, caching=caching) for caching in self.cachings[1:])

    def all(self) -> Iterator[Choice]:
        """Every combination of values that act: none of guidance where there is none, or where a course has its own.

        Several may come to one way: a measured schedule may be the even one.
        """
        for values in product(self.courses, self.guidance_scales, self.guided, self.cachings):
            choice = Choice(*values)
            own = choice.course.guidance_scale
            scale = choice.guidance_scale if own is None else own
            scale_acts = own is None or choice.guidance_scale == self.guidance_scales[0]
            if scale_acts and (scale > 1 or choice.guided == self.guided[0]):
                yield choice

    def way(self, choice: Choice) -> Way:
        """What the runtime is told; a value that has nothing to act on is left out."""
        course, caching = choice.course, choice.caching
        scale = choice.guidance_scale if course.guidance_scale is None else course.guidance_scale
        plain = Way(course.sampler, course.steps, scale)
        end = max(1, round(choice.guided * course.steps))
        guided = None if scale <= 1 or end >= course.steps else (0, end)
        whole = full_steps(course.steps, caching.interval)
        if len(whole) == course.steps:
            return replace(plain, guidance_steps=guided)
        schedule: CacheSchedule = caching.interval
        if caching.measured:
            measured = self.whole_steps(plain, len(whole))
            schedule = schedule if whole.issuperset(measured) else measured
        return replace(plain, guidance_steps=guided, deepcache=schedule)
