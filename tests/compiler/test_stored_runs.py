"""Pictures and figures that are kept: made once, and read as they were."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from whole_bundle import write_whole_bundle

from sdc.compiler.evaluate.frechet import Gaussian
from sdc.compiler.evaluate.gather import Likeness, Record
from sdc.compiler.evaluate.seed_noise import GROUPS
from sdc.compiler.evaluate.settings import prompt_triples
from sdc.compiler.evaluate.stored_runs import RunFigures, load_figures, run_digest, save_figures, stored_pictures
from sdc.compiler.tiny.judge import Verdict
from sdc.engines.bundle import open_bundle
from sdc.engines.errors import InputError
from sdc.engines.manifest import FileEntry, Manifest, TargetEntry

PROMPTS = ["a", "b", "c", "d", "e"]
SEEDS = [7, 3, 9, 1, 4]


class Maker:
    """Pictures that are their seed all over; counts its calls."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls = 0
        self.fail_at = fail_at

    def __call__(self, _prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return np.stack([np.full((3, 4, 4), seed, np.float32) for seed in seeds])


def ignore(_done: int) -> None:
    pass


def test_pictures_are_made_once(tmp_path: Path) -> None:
    make, path = Maker(), tmp_path / "pictures.npy"
    for _ in range(2):
        look_up = stored_pictures(path, make, PROMPTS, SEEDS, batch=2, progress=ignore)
    assert make.calls == 3
    assert look_up(["e", "a"], [4, 7])[:, 0, 0, 0].tolist() == [4, 7]


def test_an_interrupted_run_leaves_no_pictures(tmp_path: Path) -> None:
    path = tmp_path / "pictures.npy"
    with pytest.raises(KeyboardInterrupt):
        stored_pictures(path, Maker(fail_at=2), PROMPTS, SEEDS, batch=2, progress=ignore)
    assert not path.exists()
    look_up = stored_pictures(path, Maker(), PROMPTS, SEEDS, batch=2, progress=ignore)
    assert look_up(PROMPTS, SEEDS)[:, 2, 3, 3].tolist() == SEEDS


def test_pictures_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pictures.npy"
    stored_pictures(path, Maker(), PROMPTS, SEEDS, batch=2, progress=ignore)
    with pytest.raises(InputError, match="should hold 4 pictures, found 5"):
        stored_pictures(path, Maker(), PROMPTS[:4], SEEDS[:4], batch=2, progress=ignore)


@pytest.mark.parametrize("repeated", [True, False])
def test_figures_are_read_as_they_were(tmp_path: Path, repeated: bool) -> None:
    random = np.random.default_rng(0)
    count = 2 * GROUPS

    def verdict() -> Verdict:
        classes = (torch.from_numpy(random.integers(0, 8, count)) for _ in range(3))
        return Verdict(torch.from_numpy(random.standard_normal((count, 64), np.float32)), *classes)

    likeness = Likeness(random.random(count), random.random(count))
    bundle, reference = verdict(), verdict()
    period = count // 2 if repeated else count
    other = Likeness(random.random(count - period), random.random(count - period)) if repeated else None
    record = Record(bundle, reference, likeness, other)
    real = Gaussian.fit(verdict().features.numpy())
    triples = prompt_triples(count)
    run = RunFigures.of(record, triples, real, period)
    save_figures(run, tmp_path / "run.json", {"row": "int8, cpu"})
    found = load_figures(tmp_path / "run.json")
    np.testing.assert_equal(asdict(found), asdict(run))
    assert found.figures["paired.psnr_db"] == likeness.psnr_db.mean()
    assert found.worst == np.percentile(likeness.psnr_db, 5)
    assert found.noise.keys() == found.figures.keys()
    assert bool(found.other_seed) == repeated
    assert json.loads((tmp_path / "run.json").read_text())["about"] == {"row": "int8, cpu"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_digest_changes_with_all_that_changes_pictures_or_verdicts(tmp_path: Path) -> None:
    manifest = open_bundle(write_whole_bundle(tmp_path / "bundle", targets=("ort-cpu", "cpu"))).manifest
    target = manifest.targets["ort-cpu"]
    unet = target.engines["unet"]

    def with_file(name: str) -> Manifest:
        return replace(manifest, files={**manifest.files, name: FileEntry("0" * 64, 1)})

    def with_target(entry: TargetEntry) -> Manifest:
        return replace(manifest, targets={**manifest.targets, "ort-cpu": entry})

    same = run_digest(manifest, "ort-cpu", ["judge"])
    others = [
        run_digest(manifest, "ort-cpu", ["another judge"]),
        run_digest(with_file(unet.files[0]), "ort-cpu", ["judge"]),
        run_digest(with_file("scheduler/scheduler_config.json"), "ort-cpu", ["judge"]),
        run_digest(with_file("tokenizer/tokenizer.json"), "ort-cpu", ["judge"]),
        run_digest(with_target(replace(target, built_with={"onnxruntime": "0"})), "ort-cpu", ["judge"]),
        run_digest(
            with_target(replace(target, engines={**target.engines, "unet": replace(unet, options={"a": 1})})),
            "ort-cpu",
            ["judge"],
        ),
    ]
    assert len({same, *others}) == 1 + len(others)
    assert run_digest(with_file("reports/passes.json"), "ort-cpu", ["judge"]) == same
    assert run_digest(with_file(manifest.targets["cpu"].engines["unet"].files[0]), "ort-cpu", ["judge"]) == same
