"""Presets: how a bundle draws unless it is told otherwise, as `sdc tune` found it; and how options go with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sdc.engines.checked_json import JsonValue
from sdc.engines.deepcache import CacheSchedule
from sdc.engines.errors import InputError
from sdc.engines.samplers import find_sampler

USUAL_SAMPLER, USUAL_GUIDANCE = "ddim", 5.0
"""What is drawn with where neither an option nor a preset says."""

AUTO: Literal["auto"] = "auto"
"""DeepCache's schedule as it was measured."""


@dataclass(frozen=True)
class Way:
    """A way to draw: all that changes how a picture comes about, not what it shows.

    Attributes:
        sampler: a key of ``SAMPLERS``.
        steps: denoising steps.
        guidance_scale: see `sdc.engines.generation.Generation`; likewise ``guidance_steps``, ``deepcache`` and
            ``deepcache_center``.
    """

    sampler: str
    steps: int
    guidance_scale: float
    guidance_steps: tuple[int, int] | None = None
    deepcache: CacheSchedule = 1
    deepcache_center: int | None = None

    def without_shortcuts(self) -> Way:
        """The same with every step in full."""
        return replace(self, guidance_steps=None, deepcache=1, deepcache_center=None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `read_way` is the inverse."""
        value = asdict(self)
        return {name: list(each) if isinstance(each, tuple) else each for name, each in value.items()}

    def __str__(self) -> str:
        return options_text(asdict(self))


def options_text(values: Mapping[str, Any]) -> str:
    """Values of a `Way` by their names, as the options of `sdc run` that give them."""
    parts = []
    for name, option in _OPTIONS.items():
        value = values.get(name)
        if value is None or (name == "deepcache" and value == 1):
            continue
        if isinstance(value, tuple):
            text = (":" if name == "guidance_steps" else ",").join(map(str, value))
        else:
            text = value if isinstance(value, str) else f"{value:g}"
        parts.append(f"{option} {text}")
    return " ".join(parts)


_OPTIONS = {
    "sampler": "--sampler",
    "steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_steps": "--guidance-steps",
    "deepcache": "--deepcache",
    "deepcache_center": "--deepcache-center",
}
_SHORTCUTS = frozenset({"guidance_steps", "deepcache", "deepcache_center"})


@dataclass(frozen=True)
class Preset:
    """What `sdc tune` chose, and on which grounds.

    Attributes:
        way: what is drawn with.
        budget: as it was asked for, e.g. "fd=+1".
        quality: measured, in the budget's measure.
        pictures: that it was measured on.
        speed_up: how many times as fast a picture was as one that ``reference_bundle`` drew in the way ``reference``,
            both drawn in turn on one machine.
        reference: the way that it was compared with.
        target: whose engines drew.
        cached: ways with DeepCache that kept to the budget, the fastest for each sampler and number of steps.
        reference_bundle: what it was compared with, "fp32 on cpu", where that is not the bundle that has the preset.
    """

    way: Way
    budget: str
    quality: float
    pictures: int
    speed_up: float
    reference: Way
    target: str
    cached: tuple[Way, ...] = ()
    reference_bundle: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `read_preset` is the inverse."""
        return {
            "way": self.way.to_json(),
            "budget": self.budget,
            "quality": self.quality,
            "pictures": self.pictures,
            "speed_up": self.speed_up,
            "reference": self.reference.to_json(),
            "target": self.target,
            "cached": [way.to_json() for way in self.cached],
            **({} if self.reference_bundle is None else {"reference_bundle": self.reference_bundle}),
        }

    def reference_text(self) -> str:
        """What ``speed_up`` is relative to, as it is told to people."""
        return f"{self.reference}{'' if self.reference_bundle is None else f' of {self.reference_bundle}'}"

    def cached_way(self, sampler: str, steps: int) -> Way | None:
        """The way with DeepCache that was measured for a sampler and a number of steps; None if there is none."""
        return next((way for way in self.cached if (way.sampler, way.steps) == (sampler, steps)), None)


@dataclass(frozen=True)
class Asked:
    """The options of a call; None where one was not given. ``deepcache`` may be `AUTO`."""

    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_steps: tuple[int, int] | None = None
    deepcache: CacheSchedule | Literal["auto"] | None = None
    deepcache_center: int | None = None


def preset_values(asked: Asked, preset: Preset | None) -> dict[str, Any]:
    """What a preset sets beside the options of a call, by names of `Way`.

    Options win, and with one goes what belongs to it: nothing of the preset is left with another sampler; no shortcut
    with another number of steps, which it counts; no range of guided steps without guidance; and no centre with another
    schedule.
    """
    if preset is None or asked.sampler not in (None, preset.way.sampler):
        return {}
    left_out = {name for name in _OPTIONS if getattr(asked, name) is not None} - {"sampler"}
    if asked.steps not in (None, preset.way.steps):
        left_out |= _SHORTCUTS
    if asked.guidance_scale is not None and asked.guidance_scale <= 1:
        left_out.add("guidance_steps")
    if asked.deepcache is not None:
        left_out.add("deepcache_center")
    return {name: getattr(preset.way, name) for name in _OPTIONS if name not in left_out}


def complete_way(asked: Asked, preset: Preset | None) -> Way:
    """The options of a call, completed by a preset and then by what is usual.

    Raises:
        InputError: the sampler is unknown, or the measured schedule of DeepCache was asked for and there is none.
    """
    values = preset_values(asked, preset)
    given = {name: value for name in _OPTIONS if (value := getattr(asked, name)) is not None}
    values = {"sampler": USUAL_SAMPLER, "guidance_scale": USUAL_GUIDANCE, **values, **given}
    if "steps" not in values:
        values["steps"] = find_sampler(values["sampler"]).default_steps
    if values.get("deepcache") == AUTO:
        measured = None if preset is None else preset.cached_way(values["sampler"], values["steps"])
        if measured is None:
            raise InputError(
                f"deepcache auto was asked for, and the bundle has no measured schedule for {values['steps']} steps of "
                f"{values['sampler']}",
                hint=_advice(preset),
            )
        values["deepcache"] = measured.deepcache
        values.setdefault("deepcache_center", measured.deepcache_center)
    return Way(**values)


def _advice(preset: Preset | None) -> str:
    """What to do where no schedule was measured."""
    if preset is None or not preset.cached:
        return "`sdc tune` makes a bundle that has one, or choose an interval, as in --deepcache 3"
    known = "; ".join(f"{way.steps} steps of {way.sampler}" for way in preset.cached)
    return f"there is one for {known}; or choose an interval, as in --deepcache 3"


def read_preset(value: JsonValue) -> Preset:
    """Read what `Preset.to_json` made.

    Raises:
        BundleError: a key is missing or has a value of the wrong type.
    """
    return Preset(
        way=read_way(value.member("way")),
        budget=value.member("budget").text(),
        quality=value.member("quality").number(),
        pictures=value.member("pictures").integer(1),
        speed_up=value.member("speed_up").number(),
        reference=read_way(value.member("reference")),
        target=value.member("target").text(),
        cached=tuple(read_way(each) for each in value.member("cached").elements()),
        reference_bundle=value.member("reference_bundle").text() if "reference_bundle" in value.value else None,
    )


def read_way(value: JsonValue) -> Way:
    """Read what `Way.to_json` made.

    Raises:
        BundleError: a key is missing or has a value of the wrong type.
    """
    guided, cache, center = (value.member(name) for name in ("guidance_steps", "deepcache", "deepcache_center"))
    schedule = tuple(each.integer(0) for each in cache.elements()) if isinstance(cache.value, list) else None
    return Way(
        sampler=value.member("sampler").text(),
        steps=value.member("steps").integer(1),
        guidance_scale=value.member("guidance_scale").number(),
        guidance_steps=None if guided.value is None else _read_range(guided),
        deepcache=cache.integer(1) if schedule is None else schedule,
        deepcache_center=None if center.value is None else center.integer(0),
    )


def _read_range(value: JsonValue) -> tuple[int, int]:
    steps = [each.integer(0) for each in value.elements()]
    if len(steps) != 2:
        value.refuse("[first, end]")
    return steps[0], steps[1]
