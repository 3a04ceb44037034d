"""Presets in a manifest, and how the options of a call go with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdc.engines.bundle import open_bundle
from sdc.engines.errors import BundleError, InputError
from sdc.engines.preset import Asked, Preset, Way, complete_way, options_text, preset_values

CACHED = Way("ddim", 12, 2.5, deepcache=(0, 3, 7))
PRESET = Preset(
    way=Way("ddim", 12, 2.5, guidance_steps=(0, 9), deepcache=(0, 3, 7)),
    budget="psnr=30",
    quality=31.25,
    pictures=16,
    speed_up=2.75,
    reference=Way("ddim", 20, 2.5),
    target="ort-cpu",
    cached=(CACHED, Way("lcm", 4, 1.0, deepcache=2)),
)

Edit = Callable[[Callable[[dict[str, Any]], None]], None]


def test_a_preset_is_in_the_manifest_and_read_again(small_bundle: Path, edit_manifest: Edit) -> None:
    edit_manifest(lambda value: value.update(preset=PRESET.to_json()))
    manifest = open_bundle(small_bundle).manifest
    assert manifest.preset == PRESET
    assert json.loads((small_bundle / "sdc.json").read_text()) == manifest.to_json()


def test_a_preset_names_the_bundle_that_it_was_compared_with_if_it_is_another(
    small_bundle: Path, edit_manifest: Edit
) -> None:
    beside_another = replace(PRESET, reference_bundle="whole")
    edit_manifest(lambda value: value.update(preset=beside_another.to_json()))
    assert open_bundle(small_bundle).manifest.preset == beside_another
    assert beside_another.reference_text() == f"{PRESET.reference} of whole"
    assert "reference_bundle" not in PRESET.to_json()
    assert PRESET.reference_text() == str(PRESET.reference)


def test_manifests_without_one_stay_as_they_are(small_bundle: Path) -> None:
    manifest = open_bundle(small_bundle).manifest
    assert manifest.preset is None
    assert "preset" not in manifest.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda preset: preset.pop("way"), "sdc.json.preset: the key 'way' is missing"),
        (lambda preset: preset["way"].update(steps=0), "preset.way.steps: expected an integer of at least 1, found 0"),
        (lambda preset: preset["way"].update(guidance_steps=[3]), r"guidance_steps: expected \[first, end\]"),
        (lambda preset: preset["way"].update(deepcache="often"), "deepcache: expected an integer"),
        (lambda preset: preset["cached"][1].update(deepcache=[0, 1.5]), r"deepcache\[1\]: expected an integer"),
        (lambda preset: preset.update(speed_up="fast"), "speed_up: expected a number"),
        (lambda preset: preset.update(reference_bundle=3), "reference_bundle: expected a non-empty string, found 3"),
    ],
)
def test_a_damaged_preset_is_refused(
    small_bundle: Path, edit_manifest: Edit, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    value = PRESET.to_json()
    change(value)
    edit_manifest(lambda manifest: manifest.update(preset=value))
    with pytest.raises(BundleError, match=message):
        open_bundle(small_bundle)


def test_without_options_the_preset_is_taken_and_without_it_what_is_usual() -> None:
    assert complete_way(Asked(), PRESET) == PRESET.way
    assert complete_way(Asked(), None) == Way("ddim", 20, 5.0)
    assert complete_way(Asked(sampler="lcm"), None) == Way("lcm", 4, 5.0)
    assert preset_values(Asked(), None) == {}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Asked(sampler="ddim"), PRESET.way),
        (Asked(sampler="lcm"), Way("lcm", 4, 5.0)),
        (Asked(sampler="euler", guidance_scale=3), Way("euler", 20, 3)),
        (Asked(steps=12), PRESET.way),
        (Asked(steps=14), Way("ddim", 14, 2.5)),
        (Asked(guidance_scale=4.0), replace(PRESET.way, guidance_scale=4.0)),
        (Asked(guidance_scale=1.0), replace(PRESET.way, guidance_scale=1.0, guidance_steps=None)),
        (Asked(guidance_steps=(0, 12)), replace(PRESET.way, guidance_steps=(0, 12))),
        (Asked(deepcache=1), replace(PRESET.way, deepcache=1)),
        (Asked(deepcache=(0, 5)), replace(PRESET.way, deepcache=(0, 5))),
        (Asked(deepcache="auto"), PRESET.way),
        (Asked(sampler="lcm", deepcache="auto"), Way("lcm", 4, 5.0, deepcache=2)),
        (Asked(steps=20, deepcache=3, deepcache_center=4), Way("ddim", 20, 2.5, deepcache=3, deepcache_center=4)),
    ],
)
def test_options_win_and_take_along_what_belongs_to_them(asked: Asked, expected: Way) -> None:
    assert complete_way(asked, PRESET) == expected


def test_a_centre_of_the_preset_goes_with_its_interval_only() -> None:
    centred = replace(PRESET, way=replace(CACHED, deepcache=3, deepcache_center=5))
    assert complete_way(Asked(), centred).deepcache_center == 5
    assert complete_way(Asked(deepcache=2), centred) == replace(CACHED, deepcache=2)


def test_a_measured_schedule_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"no measured schedule for 20 steps of ddim; `sdc tune` makes"):
        complete_way(Asked(deepcache="auto"), None)
    with pytest.raises(InputError, match=r"for 13 steps of ddim; there is one for 12 steps of ddim; 4 steps of lcm"):
        complete_way(Asked(steps=13, deepcache="auto"), PRESET)


def test_a_way_is_told_as_options() -> None:
    assert str(PRESET.way) == "--sampler ddim --steps 12 --guidance 2.5 --guidance-steps 0:9 --deepcache 0,3,7"
    assert str(Way("lcm", 4, 1.0)) == "--sampler lcm --steps 4 --guidance 1"
    assert options_text({"deepcache": 3, "deepcache_center": 0}) == "--deepcache 3 --deepcache-center 0"
