"""Whole exports from the command line: equal bytes, and a whole bundle, the old one or none whatever happens."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import psutil
import pytest
from minimal_pipeline import save_minimal_pipeline

from sdc.compiler.memory.engine_plan import Request
from sdc.compiler.memory.graph_json import MEMORY_REPORT, graph_from_json
from sdc.compiler.memory.picture_plan import plan_pictures
from sdc.engines import load
from sdc.engines.bundle import open_bundle
from sdc.engines.checked_json import read_json
from sdc.engines.errors import InputError
from sdc.engines.wiring import shards_of
from sdc.passes.memory.from_graph import buffers_from_graph

COMMAND = [sys.executable, "-c", "import sys; from sdc.compiler.cli import main; sys.exit(main())", "export"]
LARGEST_FILE_BYTES = 300_000
"""Below the size of the networks' weights, above that of everything else in a bundle."""


class Exporter:
    """Runs `sdc export` on one model with one cache."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model = model
        self.cache = cache

    def start(
        self, out: Path, *options: str, precision: str = "fp32", preexec: Callable[[], None] | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, "--model", self.model, "--precision", precision, "--target", "ort-cpu", "--out", out, *options],
            env={**os.environ, "SDC_CACHE": str(self.cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec,
        )

    def __call__(self, out: Path, *options: str, precision: str = "fp32") -> str:
        process = self.start(out, *options, precision=precision)
        printed, said = process.communicate()
        assert process.returncode == 0, said
        return printed

    def with_own_cache(self, folder: Path, *, emptied: str = "") -> Exporter:
        """The same model with a copy of the cache in which one stage has no results."""
        shutil.copytree(self.cache, folder)
        if emptied:
            shutil.rmtree(folder / "stages" / emptied)
        return Exporter(self.model, folder)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """An exporter with an fp32 and an int8 bundle in its cache and beside it; copy the bundles, do not change them."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "model").mkdir()
    exporter = Exporter(save_minimal_pipeline(folder / "model"), folder / "cache")
    for precision in ("fp32", "int8"):
        exporter(folder / precision, precision=precision)
    return exporter


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_sound(bundle: Path, precision: str) -> None:
    opened = open_bundle(bundle)
    opened.check_digests()
    assert opened.manifest.precision == precision


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    pytest.fail(f"{text!r} was never said: {''.join(seen)}")


def test_export_without_cache_gives_the_same_bytes(warm: Exporter, tmp_path: Path) -> None:
    again = Exporter(warm.model, tmp_path / "cache")
    again(tmp_path / "int8", precision="int8")
    expected, found = contents(warm.cache.parent / "int8"), contents(tmp_path / "int8")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert any(name.startswith("calibration/") for name in found)


def test_second_export_builds_nothing_and_leaves_the_bundle_alone(warm: Exporter, tmp_path: Path) -> None:
    out = Path(shutil.copytree(warm.cache.parent / "int8", tmp_path / "int8"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    summary = json.loads(warm(out, "--json", precision="int8"))
    assert summary["up_to_date"] is True
    assert [stage["name"] for stage in summary["stages"] if not stage["cached"]] == ["load"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_damaged_bundle_is_written_again(warm: Exporter, tmp_path: Path) -> None:
    out = Path(shutil.copytree(warm.cache.parent / "fp32", tmp_path / "fp32"))
    flip_byte(out / "unet" / "model.onnx")
    summary = json.loads(warm(out, "--json"))
    assert summary["up_to_date"] is False
    assert contents(out) == contents(warm.cache.parent / "fp32")


def test_damaged_cache_entry_is_made_again(warm: Exporter, tmp_path: Path) -> None:
    exporter = warm.with_own_cache(tmp_path / "cache")
    for weights in (exporter.cache / "stages" / "build").rglob("*.onnx"):
        flip_byte(weights)
    summary = json.loads(exporter(tmp_path / "fp32", "--json"))
    assert {stage["name"] for stage in summary["stages"] if not stage["cached"]} >= {"build unet for ort-cpu"}
    assert contents(tmp_path / "fp32") == contents(warm.cache.parent / "fp32")


@pytest.mark.parametrize("stage", ["load", "calibrate unet", "build text_encoder", "build vae_encoder"])
def test_killed_export_leaves_the_old_bundle_and_the_next_one_succeeds(
    warm: Exporter, tmp_path: Path, stage: str
) -> None:
    exporter = warm.with_own_cache(tmp_path / "cache", emptied="build")
    shutil.rmtree(exporter.cache / "stages" / "calibrate")
    out = Path(shutil.copytree(warm.cache.parent / "fp32", tmp_path / "out" / "bundle"))
    process = exporter.start(out, precision="int8")
    read_until(process, stage)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert_sound(out, "fp32")
    psutil.wait_procs(workers, timeout=20)
    assert not [worker for worker in workers if worker.is_running()]
    exporter(out, precision="int8")
    assert contents(out) == contents(warm.cache.parent / "int8")
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    assert not list(exporter.cache.rglob("*.partial-*"))


@pytest.mark.usefixtures("heeded_interrupt")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_export_cleans_up_and_says_one_word(
    warm: Exporter, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    exporter = warm.with_own_cache(tmp_path / "cache", emptied="build")
    out = tmp_path / "out" / "bundle"
    process = exporter.start(out, precision="int8")
    read_until(process, "calibrate unet")  # every build is still to come
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert said.splitlines()[-1] == f"sdc: {'interrupted' if number == signal.SIGINT else 'terminated'}"
    assert "Traceback" not in said
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("emptied", ["", "build"])
def test_full_disk_is_one_message_and_changes_nothing(warm: Exporter, tmp_path: Path, emptied: str) -> None:
    """Full while the bundle is copied, and while an engine is built."""
    exporter = warm.with_own_cache(tmp_path / "cache", emptied=emptied)
    out = Path(shutil.copytree(warm.cache.parent / "fp32", tmp_path / "out" / "bundle"))

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, LARGEST_FILE_BYTES))

    process = exporter.start(out, precision="int8", preexec=limit_files)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "no space is left" in said.splitlines()[-1]
    assert "SDC_CACHE" in said
    assert "Traceback" not in said
    assert_sound(out, "fp32")
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_folder_that_is_no_bundle_is_refused_before_any_work(warm: Exporter, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("three years")
    process = warm.start(tmp_path / "thesis")
    _, said = process.communicate()
    assert process.returncode == 2
    assert said.startswith(f"sdc: {tmp_path / 'thesis'} exists and is no bundle")
    assert contents(tmp_path / "thesis") == {"chapter.txt": b"three years"}


def test_a_file_in_the_place_of_a_folder_is_refused_before_any_work(warm: Exporter, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("three years")
    process = warm.start(tmp_path / "thesis" / "bundle")
    _, said = process.communicate()
    assert process.returncode == 2
    assert said == f"sdc: {tmp_path / 'thesis'} is a file, expected a folder; choose another --out\n"


def test_exported_bundle_draws(warm: Exporter, cache: Path) -> None:
    del cache  # digests are remembered in a folder of this test's own
    with load(warm.cache.parent / "int8") as pipe:
        (image,) = pipe("a lighthouse", steps=2, seed=3)
    assert image.size == (40, 40)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_bundles_carry_the_buffers_of_their_engines(warm: Exporter) -> None:
    for precision in ("fp32", "int8"):
        bundle = open_bundle(warm.cache.parent / precision)
        carried = read_json(bundle.file(MEMORY_REPORT))
        assert [component for component, _ in carried.members()] == list(bundle.manifest.components)
        for component, targets in carried.members():
            (target, value), *others = targets.members()
            assert (target, others) == ("ort-cpu", [])
            graph = buffers_from_graph(ir.load(bundle.path / component / "model.onnx"))
            assert graph_from_json(value) == graph


def test_a_hoisted_part_runs_while_the_unet_is_loaded(warm: Exporter) -> None:
    plan = plan_pictures(open_bundle(warm.cache.parent / "fp32"), "ort-cpu", Request(40, 40, 1, 5.0))
    prompt, unet = (next(each for each in plan.stages if each.component == name) for name in ("unet_prompt", "unet"))
    own = {name: engine.activation_bytes for name, engine in plan.engines.items()}
    held = {name: engine.held.weight_bytes + engine.held.graph_bytes for name, engine in plan.engines.items()}
    assert prompt.released_bytes == held["unet"] + held["unet_prompt"] + own["unet_prompt"] + prompt.input_bytes
    assert unet.released_bytes == held["unet"] + own["unet"] + unet.input_bytes
    assert plan.released_bytes == max(stage.released_bytes for stage in plan.stages) < plan.peak.total_bytes


def test_deepcache_builds_the_unet_alone_anew(warm: Exporter, tmp_path: Path, cache: Path) -> None:
    out, summary = tmp_path / "bundle", tmp_path / "summary.json"
    plain = contents(warm.cache.parent / "fp32")
    warm(out, "--deepcache", "--json", str(summary))
    built = [stage["name"] for stage in json.loads(summary.read_text())["stages"] if not stage["cached"]]
    assert built == ["load", "build unet for ort-cpu", "write bundle"]
    assert_sound(out, "fp32")
    found = contents(out)
    shallow = {name for name in found if name.startswith("unet_shallow/")}
    assert shallow == {"unet_shallow/model.onnx", "unet_shallow/model.onnx_data"}
    changed = {name for name in plain if found[name] != plain[name]}
    reports = {f"reports/{name}.json" for name in ("export", "memory", "passes")}
    assert changed == {"sdc.json", "request.json", "unet/model.onnx", *reports}
    assert found.keys() - plain.keys() == shallow
    with load(out, "ort-cpu") as pipe:
        whole, cached = (pipe("a bag", steps=4, seed=1, deepcache=interval)[0] for interval in (1, 2))
    with load(warm.cache.parent / "fp32", "ort-cpu") as pipe:
        assert pipe("a bag", steps=4, seed=1)[0].tobytes() == whole.tobytes()
    assert cached.tobytes() != whole.tobytes()

    warm(out)
    assert contents(out) == plain, "without it, the bundle is what it was"


def test_deepcache_cuts_what_the_whole_unet_was_calibrated_for(warm: Exporter, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "bundle"
    warm(out, "--deepcache", precision="int8")
    plain, found = contents(warm.cache.parent / "int8"), contents(out)
    for name in ("calibration/unet.json", "unet_prompt/model.onnx_data", "unet_timestep/model.onnx_data"):
        assert found[name] == plain[name]
    assert any(node.op_type == "QLinearConv" for node in ir.load(out / "unet_shallow" / "model.onnx").graph)
    with load(out, "ort-cpu") as pipe:
        assert pipe("a bag", steps=4, seed=1, deepcache=2)[0].size == (40, 40)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_bundle_in_shards_draws_the_same_pictures(
    warm: Exporter, tmp_path: Path, cache: Path, precision: str
) -> None:
    out, summary = tmp_path / "bundle", tmp_path / "summary.json"
    warm(out, "--shards", "3", "--json", str(summary), precision=precision)
    built = [stage["name"] for stage in json.loads(summary.read_text())["stages"] if not stage["cached"]]
    assert built == ["load", "build unet for ort-cpu", "write bundle"]
    assert_sound(out, precision)
    assert not any(name.startswith("unet/model") for name in contents(out))
    assert len(shards_of(open_bundle(out).manifest.components)) == 3
    pictures = []
    for options in ({}, {"prefetch": False}, {"keep_loaded": False}):
        with load(out, "ort-cpu", **options) as pipe:
            pictures.append(pipe("a bag", steps=3, seed=1)[0].tobytes())
    with load(warm.cache.parent / precision, "ort-cpu") as pipe:
        whole = pipe("a bag", steps=3, seed=1)[0].tobytes()
    assert pictures == [whole] * 3


@pytest.mark.parametrize(("count", "message"), [("1", "--shards 1 leaves nothing to cut"), ("999", "be cut into 2 to")])
def test_numbers_of_shards_that_cannot_be_are_refused(warm: Exporter, tmp_path: Path, count: str, message: str) -> None:
    process = warm.start(tmp_path / "bundle", "--shards", count)
    assert message in process.communicate()[1]
    assert process.returncode == 2
    assert not (tmp_path / "bundle").exists()


def test_both_unets_are_planned_to_be_in_memory(warm: Exporter, tmp_path: Path) -> None:
    warm(tmp_path / "bundle", "--deepcache", "1")
    bundle = open_bundle(tmp_path / "bundle")
    without = plan_pictures(bundle, "ort-cpu", Request(40, 40, 1, 5.0))
    plan = plan_pictures(bundle, "ort-cpu", Request(40, 40, 1, 5.0, deepcache=True))
    stages = {stage.component: stage for stage in plan.stages}
    assert [name for name in stages if name.startswith("unet")] == [
        "unet_prompt",
        "unet_timestep",
        "unet",
        "unet_shallow",
    ]
    assert "unet_shallow" not in {stage.component for stage in without.stages}
    unet, shallow = (plan.engines[name] for name in ("unet", "unet_shallow"))
    both = sum(engine.held.weight_bytes + engine.held.graph_bytes for engine in (unet, shallow))
    own = shallow.activation_bytes + stages["unet_shallow"].input_bytes
    assert stages["unet_shallow"].released_bytes == both + own
    assert "unet_shallow" in stages["unet_prompt"].loaded
    assert plan.peak.weight_bytes == without.peak.weight_bytes + shallow.held.weight_bytes
    with pytest.raises(InputError, match="has no shallow UNet; export it with --deepcache"):
        plan_pictures(open_bundle(warm.cache.parent / "fp32"), "ort-cpu", Request(40, 40, 1, 5.0, deepcache=True))
