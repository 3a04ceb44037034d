"""`sdc tune` with several bundles, or beside another one: which is copied, and what times are relative to."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stopping import Stops
from whole_bundle import write_whole_bundle

from sdc.compiler.cli import main
from sdc.compiler.evaluate.settings import JUDGED_MODEL, Settings
from sdc.compiler.inspect.inspect import inspect_bundle
from sdc.compiler.inspect.report import format_bundle
from sdc.compiler.tune.budget import parse_budget
from sdc.compiler.tune.candidates import open_candidates, short_names
from sdc.compiler.tune.page import tuning_page
from sdc.compiler.tune.report import format_tuning, latest
from sdc.compiler.tune.tune import TUNING_REPORT, TuneRequest, Tuning, tune
from sdc.engines.bundle import open_bundle
from sdc.engines.errors import InputError, TargetError
from sdc.engines.preset import Way

SETTINGS = Settings(samples=4, steps=6, guidance_scale=2.5, threads=1)
OWN = Way("ddim", 6, 2.5)
"""How the reference draws."""

WIDE = 4096
"""Idle channels with which a step takes several times as long."""


def request(*bundles: Path, out: Path, **others: Any) -> TuneRequest:
    return TuneRequest(bundles, out, **{"budget": parse_budget("psnr=25"), "settings": SETTINGS, "rounds": 3, **others})


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change what the manifest says."""
    path = bundle / "sdc.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return bundle


def carry_few_steps(bundle: Path) -> Path:
    """Have a bundle say that it was made with a LoRA for few steps."""
    lora = {"file": "lcm.safetensors", "scale": 1.0, "sha256": "0" * 64, "few_steps": True}
    calibration = {"method": "mse", "symmetric": None, "correct_bias": False, "reduce_range": None, "prompts": None}
    content = json.dumps(
        {
            "model": "small",
            "weights": "trained",
            "seed": 0,
            "config": None,
            "checkpoint": {},
            "loras": [lora],
            "precision": "fp32",
            "targets": ["ort-cpu"],
            "fuse": True,
            "hoist": True,
            "deepcache": None,
            "shards": None,
            "calibration": calibration,
        }
    ).encode()
    (bundle / "request.json").write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return edit(bundle, lambda manifest: manifest["files"].update({"request.json": entry}))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_bundle(tmp_path_factory.mktemp("slow") / "slow", idle_channels=WIDE)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draws what `slow` draws, and says that it can draw in few steps."""
    return carry_few_steps(write_whole_bundle(tmp_path_factory.mktemp("fast") / "fast"))


@pytest.fixture(scope="module")
def tuning(slow: Path, fast: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    return tune(request(slow, fast, out=tmp_path_factory.mktemp("tuned") / "copy"))


def test_the_faster_bundle_is_chosen_and_copied(slow: Path, fast: Path, tuning: Tuning) -> None:
    assert tuning.chosen.bundle == fast
    assert tuning.chosen.ratio == min(each.ratio for each in tuning.measurements if each.quality >= 25)
    copy = open_bundle(tuning.request.out)
    copy.check_digests(remembered=False)
    ours, theirs = copy.manifest, open_bundle(fast).manifest
    assert {name for name, file in ours.files.items() if theirs.files.get(name) != file} == {TUNING_REPORT}
    assert ours.files["unet/model.onnx"] != open_bundle(slow).manifest.files["unet/model.onnx"]
    assert ours.preset == tuning.preset
    assert tuning.preset.way == tuning.chosen.way
    assert tuning.preset.speed_up == 1 / tuning.chosen.ratio
    assert tuning.preset.reference == OWN
    assert tuning.preset.reference_bundle == "slow on ort-cpu"


def test_all_are_compared_with_the_first_and_timed_beside_it(slow: Path, fast: Path, tuning: Tuning) -> None:
    found = {each.drawing: each for each in tuning.measurements}
    assert (found[slow, OWN].ratio, found[slow, OWN].quality) == (1.0, 100.0)
    assert found[fast, OWN].quality > 60, "the same pictures"
    assert found[fast, OWN].ratio < 0.7
    halved = replace(OWN, steps=3)
    assert found[slow, halved].quality == pytest.approx(found[fast, halved].quality, abs=0.1)
    assert found[fast, halved].ratio < found[slow, halved].ratio < 0.8


def test_ways_are_what_each_bundle_can_do(slow: Path, fast: Path, tuning: Tuning) -> None:
    def samplers(bundle: Path) -> set[str]:
        return {each.way.sampler for each in tuning.measurements if each.bundle == bundle}

    assert samplers(slow) == {"ddim"}
    assert samplers(fast) == {"ddim", "lcm"}


def test_measurements_and_reports_name_the_bundle(slow: Path, fast: Path, tuning: Tuning) -> None:
    table = json.loads((tuning.request.out / TUNING_REPORT).read_text())
    assert (table["bundle"], table["bundles"], table["reference"]) == (str(fast), [str(slow), str(fast)], None)
    assert [each["bundle"] for each in table["measurements"]] == [str(each.bundle) for each in tuning.measurements]
    text = format_tuning(tuning)
    ways = latest(tuning)
    names = [line.split()[0] for line in text.splitlines()[2 : 2 + len(ways)]]
    assert names == [each.bundle.name for each in ways]
    assert {"slow", "fast"} == set(names)
    assert f"is written, a copy of {fast}: small, fp32, with the preset\n  {tuning.chosen.way}\n" in text
    relative = f"times as fast on ort-cpu as {OWN} of slow on ort-cpu; "
    assert relative in text
    assert relative in format_bundle(inspect_bundle(open_bundle(tuning.request.out)))


def test_the_plot_has_a_shape_for_each_bundle(slow: Path, fast: Path, tuning: Tuning) -> None:
    html, ways = tuning_page(tuning), latest(tuning)
    of_slow = [each for each in ways if each.bundle == slow]
    assert html.count("<circle") == len(of_slow) + 1, "and one in the legend"
    assert html.count("<polygon") == len(ways) - len(of_slow) + 1
    assert html.count('<g class="second">') == 1
    assert '<g class="second"><polygon points="' in html
    assert all(f"<title>{each.bundle.name}, {each.way}: " in html for each in ways)
    assert "<h1>Ways to draw with " in html
    assert f"fast is chosen: small, fp32, target ort-cpu. The preset: {tuning.chosen.way}" in html


def test_times_are_relative_to_a_reference_that_is_given(slow: Path, fast: Path, tmp_path: Path) -> None:
    tuning = tune(request(fast, out=tmp_path / "copy", reference=slow))
    first = tuning.measurements[0]
    assert first.drawing == (fast, OWN)
    assert first.ratio < 0.7
    assert first.quality > 60
    preset = open_bundle(tmp_path / "copy").manifest.preset
    assert preset is not None
    assert (preset.reference_bundle, preset.speed_up) == ("slow on ort-cpu", 1 / tuning.chosen.ratio)
    assert json.loads((tmp_path / "copy" / TUNING_REPORT).read_text())["reference"] == str(slow)


def test_the_slower_bundle_is_not_chosen_for_being_last(slow: Path, fast: Path, tmp_path: Path) -> None:
    tuning = tune(request(fast, slow, out=tmp_path / "copy"))
    found = {each.drawing: each for each in tuning.measurements}
    assert tuning.chosen.bundle == fast
    assert found[slow, OWN].ratio > 1.4
    assert tuning.preset.reference_bundle is None
    assert "reference_bundle" not in tuning.preset.to_json()
    assert f"times as fast on ort-cpu as {OWN}; " in format_tuning(tuning)


def test_an_interrupted_tuning_goes_on_and_another_set_begins_anew(slow: Path, fast: Path, tmp_path: Path) -> None:
    other, out = write_whole_bundle(tmp_path / "other", seed=8), tmp_path / "copy"
    alone = Stops()
    tune(request(fast, out=tmp_path / "single", rounds=1), progress=alone)
    assert not any(": " in name for name in alone.names), "one bundle needs no name"
    until_second = Stops(after=len(alone.names) + 3)
    with pytest.raises(KeyboardInterrupt):
        tune(request(fast, other, out=out, rounds=1), progress=until_second)
    done = [name for name in until_second.names if not name.startswith("reference")]
    assert {name.split(": ")[0] for name in done} == {"fast", "other"}

    changed = Stops(after=4)
    with pytest.raises(KeyboardInterrupt):
        tune(request(fast, slow, out=out, rounds=1), progress=changed)
    assert set(changed.names[1:]) <= set(done), "measured again: it is another set"

    moved = other.rename(tmp_path / "moved")
    resumed = Stops()
    tuning = tune(request(fast, moved, out=out, rounds=1), progress=resumed)
    kept = {name.replace("other: ", "moved: ") for name in done[:-1]}  # the last was being told of
    assert not kept & set(resumed.names)
    assert not any(name.startswith("fast: ") for name in resumed.names)
    assert {each.bundle for each in tuning.measurements} == {fast, moved}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "moved", "single"]


def other_prompts(folder: Path) -> Path:
    return write_whole_bundle(folder / "other", seed=8, model=JUDGED_MODEL)


def other_size(folder: Path) -> Path:
    wide = write_whole_bundle(folder / "wide", seed=8)
    return edit(wide, lambda manifest: manifest["pipeline"].update(default_width_px=48))


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(folder.parent / "bundle", folder / "again"))


def same(folder: Path) -> Path:
    return folder.parent / "bundle"


def test_a_model_of_another_folder_is_a_candidate_too(tmp_path: Path) -> None:
    """What was made smaller has its folder's name."""
    paths = [write_whole_bundle(tmp_path / name, seed=seed, model=name) for seed, name in ((7, "sd"), (8, "smaller"))]
    assert [candidate.path for candidate in open_candidates(paths, Settings(samples=1))] == paths


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            other_prompts,
            "expected bundles that draw the same prompts, found 'small' in .*bundle and 'tiny' in .*other; call",
        ),
        (other_size, "expected bundles that draw one size, found 32x32 px in .*bundle and 48x32 px in .*wide; tune"),
        (
            copied,
            "expected bundles that differ, found .*bundle and .*again with the same engines for ort-cpu; name each",
        ),
        (same, "expected bundles that differ, found .*bundle and .*bundle with the same engines"),
    ],
)
def test_bundles_that_are_no_set_are_refused_before_anything_is_measured(
    tmp_path: Path, second: Callable[[Path], Path], message: str
) -> None:
    first, there = write_whole_bundle(tmp_path / "bundle"), tmp_path / "there"
    there.mkdir()
    told, bundle = Stops(), second(there)
    with pytest.raises(InputError, match=message):
        tune(request(first, bundle, out=tmp_path / "copy"), progress=told)
    assert told.names == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "there"]


def test_a_bundle_of_several_that_does_not_run_here_is_named(tmp_path: Path) -> None:
    both = write_whole_bundle(tmp_path / "both", targets=("ort-cpu", "cpu"))
    one, told = write_whole_bundle(tmp_path / "one", seed=8), Stops()
    settings = replace(SETTINGS, target="cpu")
    with pytest.raises(InputError, match=r"expected bundles that run here, found .*one: .*'cpu'; .*; or leave this"):
        tune(request(both, one, out=tmp_path / "copy", settings=settings), progress=told)
    with pytest.raises(TargetError, match="no engines for the target 'cpu'"):
        tune(request(one, out=tmp_path / "copy", settings=settings), progress=told)
    assert told.names == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "one"]


def test_a_reference_that_draws_other_pictures_is_refused(fast: Path, tmp_path: Path) -> None:
    told = Stops()
    for other, message in ((other_prompts, "same prompts, found 'tiny' in .*other and 'small' in .*fast"),
                           (other_size, "one size, found 48x32 px in .*wide and 32x32 px in .*fast")):  # fmt: skip
        reference = other(tmp_path)
        with pytest.raises(InputError, match=message):
            tune(request(fast, out=tmp_path / "copy", reference=reference), progress=told)
    for_other = write_whole_bundle(tmp_path / "openvino", targets=("cpu",))
    settings = replace(SETTINGS, target="ort-cpu")
    with pytest.raises(InputError, match=r"expected bundles that run here, found .*openvino: .*'ort-cpu'"):
        tune(request(fast, out=tmp_path / "copy", settings=settings, reference=for_other), progress=told)
    assert told.names == []


def test_a_reference_of_another_target_is_named_with_it(tmp_path: Path) -> None:
    reference = write_whole_bundle(tmp_path / "reference", targets=("cpu",))
    tuned = write_whole_bundle(tmp_path / "tuned", targets=("ort-cpu",))
    tuning = tune(request(tuned, out=tmp_path / "copy", reference=reference))
    assert f"times as fast on ort-cpu as {OWN} of reference on cpu; " in format_tuning(tuning)


@pytest.mark.parametrize("inside", [".", "copy"])
@pytest.mark.parametrize("role", ["second", "reference"])
def test_no_copy_in_any_of_them(slow: Path, fast: Path, inside: str, role: str) -> None:
    bundles, reference = ((slow, fast), None) if role == "second" else ((slow,), fast)
    told, before = Stops(), sorted(fast.rglob("*"))
    with pytest.raises(InputError, match=r"is inside the bundle .*fast; choose another --out"):
        tune(request(*bundles, out=fast / inside, reference=reference), progress=told)
    assert told.names == []
    assert sorted(fast.rglob("*")) == before


def test_the_error_names_the_bundle_that_is_nearest(fast: Path, tmp_path: Path) -> None:
    reference = write_whole_bundle(tmp_path / "reference", seed=8)
    near = write_whole_bundle(tmp_path / "near", seed=8, noise=0.01)
    with pytest.raises(InputError, match=r"the nearest is --sampler .* of .*near with [\d.]+ dB"):
        tune(request(fast, near, out=tmp_path / "copy", reference=reference, budget=parse_budget("psnr=99")))
    assert not (tmp_path / "copy").exists()


def test_the_command_takes_several_and_says_which(
    slow: Path, fast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table, page = (tmp_path / name for name in ("copy", "table.json", "page.html"))
    options = ("--budget", "psnr=25", "--steps", "4", "--samples", "4", "--rounds", "3", "--threads", "1")
    files = ("--out", str(out), "--json", str(table), "--report", str(page))
    assert main(["tune", str(slow), str(fast), *options, *files]) == 0
    output, progress = capsys.readouterr()
    assert f"{out} is written, a copy of {fast}: " in output
    assert "slow: --sampler ddim --steps 4 --guidance 3, 4 pictures" in progress
    assert "fast: --sampler ddim --steps 4 --guidance 3, 4 pictures" in progress
    assert {each["bundle"] for each in json.loads(table.read_text())["measurements"]} == {str(slow), str(fast)}
    assert "<polygon" in page.read_text()


def test_folders_of_one_name_are_told_apart_by_those_above() -> None:
    paths = [Path("/a/x/int8"), Path("/a/y/int8"), Path("/b/y/int8"), Path("/a/y/lcm"), Path("/int8")]
    names = ["x/int8", "a/y/int8", "b/y/int8", "lcm", "/int8"]
    assert list(short_names(paths).items()) == list(zip(paths, names, strict=True))
