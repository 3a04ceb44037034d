"""`sdc tune`, and `sdc run` with what it wrote: on small bundles, with their own engines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopping import Stops
from whole_bundle import write_whole_bundle

from sdc.compiler.cli import main
from sdc.compiler.evaluate.settings import Settings
from sdc.compiler.inspect.inspect import inspect_bundle
from sdc.compiler.inspect.report import format_bundle
from sdc.compiler.tune.budget import parse_budget
from sdc.compiler.tune.page import tuning_page
from sdc.compiler.tune.search import Measurement, fastest_within, on_all
from sdc.compiler.tune.tune import TUNING_REPORT, TuneRequest, Tuning, cached_ways, tune
from sdc.compiler.workshop.progress import Silent, StageRecord
from sdc.engines.bundle import open_bundle
from sdc.engines.errors import BundleError, InputError
from sdc.engines.preset import Way

DRAW = ("--prompt", "a cat", "--seed", "3", "--threads", "1")
BUDGET = parse_budget("psnr=25")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def request(bundle: Path, out: Path, **others: Any) -> TuneRequest:
    settings = Settings(samples=6, steps=12, guidance_scale=2.5, threads=1)
    return TuneRequest((bundle,), out, **{"budget": BUDGET, "settings": settings, "rounds": 1, **others})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_bundle(tmp_path_factory.mktemp("plain") / "bundle")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a shallow UNet: the smallest model that has skip connections, made by `sdc export`."""
    from minimal_pipeline import save_minimal_pipeline

    folder = tmp_path_factory.mktemp("cached")
    model = save_minimal_pipeline(folder / "model", guidance_width=None)
    command = [sys.executable, "-c", "import sys; from sdc.compiler.cli import main; sys.exit(main())"]
    options = ("--precision", "fp32", "--target", "ort-cpu", "--deepcache", "--out", str(folder / "bundle"))
    done = subprocess.run([*command, "export", "--model", str(model), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "bundle"


@pytest.fixture(scope="module")
def tuning(cached: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    return tune(request(cached, tmp_path_factory.mktemp("tuned") / "copy"))


def drawn(bundle: Path, folder: Path, *options: str) -> tuple[bytes, dict[str, Any]]:
    """The file that `sdc run` writes, and its report."""
    out, report = folder / "out.png", folder / "report.json"
    assert main(["run", str(bundle), *DRAW, "--out", str(out), "--json", str(report), *options]) == 0
    return out.read_bytes(), json.loads(report.read_text())["pictures"][0]


def test_the_copy_has_the_fastest_measured_way_as_its_preset(cached: Path, tuning: Tuning) -> None:
    preset = open_bundle(tuning.request.out).manifest.preset
    assert preset == tuning.preset
    best = fastest_within(on_all(tuning.measurements, 6), BUDGET)
    assert best is not None
    assert preset is not None
    assert preset.way == best.way
    assert preset.speed_up == pytest.approx(1 / best.ratio)
    assert tuning.measurements[0].way == preset.reference == Way("ddim", 12, 2.5)
    assert any(isinstance(each.way.deepcache, tuple) for each in tuning.measurements), "a measured schedule"


def test_the_copy_is_the_bundle_and_its_table(cached: Path, tuning: Tuning) -> None:
    ours, theirs = contents(tuning.request.out), contents(cached)
    assert set(ours) - set(theirs) == {TUNING_REPORT}
    assert {name for name in theirs if ours[name] != theirs[name]} == {"sdc.json"}
    open_bundle(tuning.request.out).check_digests(remembered=False)
    table = json.loads(ours[TUNING_REPORT])
    assert len(table["measurements"]) == len(tuning.measurements)
    assert table["chosen"]["way"] == tuning.chosen.way.to_json()
    engine = next(name for name in theirs if name.endswith(".onnx"))
    assert (tuning.request.out / engine).stat().st_ino != (cached / engine).stat().st_ino, "no link"
    assert not tuning.request.out.with_name("copy.work").exists()


def test_the_copy_draws_what_the_bundle_draws_with_the_presets_options(
    cached: Path, tuning: Tuning, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_preset, parameters = drawn(tuning.request.out, tmp_path)
    assert f"preset of the bundle: {tuning.chosen.way} (--no-preset leaves it out)" in capsys.readouterr().err
    assert with_preset == drawn(cached, tmp_path, *str(tuning.chosen.way).split())[0]
    assert with_preset != drawn(cached, tmp_path)[0]
    assert parameters["steps"] == tuning.chosen.way.steps
    assert "preset" not in capsys.readouterr().err


def test_options_win_over_the_preset(cached: Path, tuning: Tuning, tmp_path: Path) -> None:
    copy = tuning.request.out
    assert drawn(copy, tmp_path, "--no-preset") == drawn(cached, tmp_path)
    assert drawn(copy, tmp_path, "--sampler", "euler", "--steps", "3") == drawn(
        cached, tmp_path, "--sampler", "euler", "--steps", "3"
    )
    assert drawn(copy, tmp_path, "--guidance", "7.5")[1]["guidance_scale"] == 7.5


def test_deepcache_auto_is_the_measured_schedule(
    cached: Path, tuning: Tuning, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (way, *_) = tuning.preset.cached
    plain = ("--sampler", way.sampler, "--steps", str(way.steps), "--guidance", "2.5", "--guidance-steps")
    options = (*plain, f"0:{way.steps}")
    schedule = ",".join(map(str, way.deepcache)) if isinstance(way.deepcache, tuple) else str(way.deepcache)
    automatic = drawn(tuning.request.out, tmp_path, *options, "--deepcache", "auto")
    assert automatic == drawn(cached, tmp_path, *options, "--deepcache", schedule)
    assert automatic[0] != drawn(cached, tmp_path, *options)[0]
    capsys.readouterr()
    assert main(["run", str(cached), *DRAW, "--deepcache", "auto"]) == 2
    assert "no measured schedule for 20 steps of ddim; `sdc tune` makes a bundle" in capsys.readouterr().err
    assert main(["run", str(tuning.request.out), *DRAW, "--deepcache", "auto", "--no-preset"]) == 2
    assert "--deepcache auto is a part of the preset; leave out --no-preset" in capsys.readouterr().err


def test_inspect_and_the_page_show_the_preset(cached: Path, tuning: Tuning) -> None:
    text = format_bundle(inspect_bundle(open_bundle(tuning.request.out)))
    assert f"preset: {tuning.chosen.way}\n" in text
    assert "psnr=25 asked for" in text
    assert "preset" not in format_bundle(inspect_bundle(open_bundle(cached)))
    html = tuning_page(tuning)
    ways = {each.way for each in tuning.measurements}
    assert html.count("<circle") == len(ways)
    assert all(str(way) in html for way in ways)


def test_an_interrupted_tuning_leaves_no_copy_and_goes_on(plain: Path, tmp_path: Path) -> None:
    before, out = contents(plain), tmp_path / "copy"
    first, second = Stops(4), Stops(0)
    with pytest.raises(KeyboardInterrupt):
        tune(request(plain, out), progress=first)
    assert [path.name for path in tmp_path.iterdir()] == ["copy.work"]
    tuning = tune(request(plain, out), progress=second)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    reference, *measured = first.names
    assert second.names[0] == reference
    assert not set(measured[:-1]) & set(second.names), "kept, but for the one that was being told of"
    assert len(tuning.measurements) > 4
    assert contents(plain) == before


def test_a_bundle_that_changes_meanwhile_gives_no_copy(tmp_path: Path) -> None:
    bundle, out = write_whole_bundle(tmp_path / "bundle"), tmp_path / "copy"

    class Changes(Silent):
        def end(self, record: StageRecord) -> None:  # noqa: ARG002 - as it is called
            path = bundle / "vae_encoder/model.onnx"
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    with pytest.raises(BundleError, match="has changed since the export"):
        tune(request(bundle, out), progress=Changes())
    assert not out.exists()


def refuse_path(bundle: Path, folder: Path) -> Path:
    return bundle / "copy"


def refuse_taken(bundle: Path, folder: Path) -> Path:
    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").write_text("mine")
    return folder / "taken"


@pytest.mark.parametrize(
    ("place", "message"), [(refuse_path, "is inside the bundle"), (refuse_taken, "taken exists; choose another --out")]
)
def test_places_that_are_refused(
    plain: Path, tmp_path: Path, place: Callable[[Path, Path], Path], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tune(request(plain, place(plain, tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "fd=+1.0"), "a Fréchet distance needs a judge of pictures, which there is for 'tiny', not for"),
        (("--budget", "ssim=1"), "--budget 'ssim=1': expected fd=NUMBER or psnr=NUMBER"),
        (("--budget", "psnr=30", "--rounds", "0"), "--rounds must be 1 or more"),
        (("--budget", "psnr=30", "--json", "nowhere/a.json"), "cannot be written"),
        (("--budget", "psnr=30", "--samples", "0"), "samples must be in"),
    ],
)
def test_what_is_refused_leaves_nothing(
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", str(plain), "--out", "copy", *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_way_keeps_to_the_budget_of_another_reference(plain: Path, tmp_path: Path) -> None:
    other = write_whole_bundle(tmp_path / "other", seed=8)
    with pytest.raises(InputError, match=r"no way to draw keeps to --budget psnr=90; the nearest is --sampler ddim"):
        tune(request(plain, tmp_path / "copy", reference=other, budget=parse_budget("psnr=90")))
    assert not (tmp_path / "copy").exists()


def test_the_command_says_and_writes_what_was_found(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table, page = (tmp_path / name for name in ("copy", "table.json", "page.html"))
    arguments = ("--budget", "psnr=25", "--steps", "8", "--samples", "4", "--rounds", "1", "--threads", "1")
    files = ("--json", str(table), "--report", str(page))
    assert main(["tune", str(plain), "--out", str(out), *arguments, *files]) == 0
    output, progress = capsys.readouterr()
    preset = open_bundle(out).manifest.preset
    assert preset is not None
    assert f"with the preset\n  {preset.way}\n" in output
    assert "--sampler ddim --steps 8 --guidance 3, 4 pictures" in progress
    assert json.loads(table.read_text()) == json.loads((out / TUNING_REPORT).read_text())
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_schedules_for_auto_are_the_fastest_within_the_budget() -> None:
    ours, other = Path("ours"), Path("other")

    def found(way: Way, quality: float, ratio: float, pictures: int = 8, bundle: Path = ours) -> Measurement:
        return Measurement(bundle, way, pictures, quality, 0.0, quality, ratio, ratio)

    slow, fast, harmful = (Way("ddim", 12, 2.5, deepcache=interval) for interval in (2, 3, 5))
    doubtful, fewer = Way("ddim", 12, 2.5, deepcache=4), Way("ddim", 6, 2.5, deepcache=2)
    measurements = [
        found(slow, 40, 0.7),
        found(fast, 30, 0.5),
        found(harmful, 20, 0.3),
        found(doubtful, 26, 0.4),
        found(doubtful, 24, 0.4, pictures=16),
        found(fewer, 26, 0.35),
        found(Way("ddim", 6, 2.5), 28, 0.5),
        found(harmful, 40, 0.2, bundle=other),
        found(fast, 20, 0.5, pictures=16, bundle=other),
        found(Way("ddim", 3, 2.5, deepcache=2), 40, 0.2, bundle=other),
    ]
    assert cached_ways(measurements, BUDGET, measurements[6]) == (fast, fewer)
    assert cached_ways(measurements, BUDGET, measurements[0]) == (slow, fewer)
