"""`sdc run` around torch modules, and what importing the runtime costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch_pipeline import ARCHITECTURES, build_diffusers, build_ours

from sdc.compiler.cli import main, run
from sdc.engines import load
from sdc.engines.errors import BundleError
from sdc.engines.pipeline import Pipeline

PROMPT = "a red bag"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("model")
    ours, _ = build_ours(build_diffusers(ARCHITECTURES[0], folder), folder / "tokenizer")
    ours.provenance["target"] = "cpu"
    return ours


@pytest.fixture
def sdc_run(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line in a fresh folder, on a bundle whose engines are torch modules."""
    opened: list[tuple[Any, ...]] = []

    def load_torch(
        bundle: Path, target: str | None, *, threads: int | None, keep_loaded: bool, prefetch: bool
    ) -> Pipeline:
        opened.append((bundle, target, threads))
        return pipe

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "load", load_torch)

    def call(*arguments: str) -> int:
        return main(["run", "some-bundle", "--prompt", PROMPT, "--steps", "2", *arguments])

    call.opened = opened  # type: ignore[attr-defined]
    return call


def test_one_picture(sdc_run: Any, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sdc_run("--seed", "3", "--out", "bag.png", "--target", "cpu", "--threads", "1") == 0
    assert sdc_run.opened == [(Path("some-bundle"), "cpu", 1)]
    output, progress = capsys.readouterr()
    assert output == "bag.png\n"
    assert "step 1/2  " in progress
    assert "step 2/2  " in progress
    assert "seed 3" in progress
    with Image.open(tmp_path / "bag.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(pipe(PROMPT, steps=2, seed=3)[0]))
        assert json.loads(image.text["sdc"])["prompt"] == PROMPT


def test_several_pictures_are_numbered(sdc_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--batch", "3", "--out", "a.b.png", "--negative-prompt", "blue", "--sampler", "euler", "--seed", "4"]
    assert sdc_run(*arguments, "--guidance", "2.5", "--height", "48", "--width", "16", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    names = ["a.b-1.png", "a.b-2.png", "a.b-3.png"]
    assert [picture["file"] for picture in report["pictures"]] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len(report["step_seconds"]) == 2
    first = report["pictures"][0]
    assert (first["sampler"], first["guidance_scale"], first["negative_prompt"]) == ("euler", 2.5, "blue")
    with Image.open(tmp_path / names[2]) as image:
        assert image.size == (16, 48)


def test_guidance_at_some_steps(sdc_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert sdc_run("--guidance-steps", "1:2", "--seed", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pictures"][0]["guidance_steps"] == [1, 2]


@pytest.mark.parametrize("text", ["3", "1-2", "1:", ":2", "-1:2", "1:2:3"])
def test_a_range_of_steps_that_is_none_is_a_usage_error(
    sdc_run: Any, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert sdc_run(f"--guidance-steps={text}") == 2
    assert f"expected FIRST:END, as in 2:12, found '{text}'" in capsys.readouterr().err


def test_the_report_goes_to_a_file(sdc_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sdc_run("--json", "report.json", "--eta", "0.5") == 0
    assert capsys.readouterr().out == "out.png\n"
    assert json.loads((tmp_path / "report.json").read_text())["pictures"][0]["eta"] == 0.5


def test_the_summary_tells_engines_apart() -> None:
    assert run._summary([4.0, 0.4, 0.3, 0.5], ["unet"] * 4) == "4 steps of 400.0 ms (median)"
    engines = ["unet", "unet_shallow", "unet_shallow", "unet", "unet_shallow"]
    told = run._summary([0.4, 0.1, 0.3, 0.5, 0.2], engines)
    assert told == "2 steps of 500.0 ms and 3 shallow steps of 300.0 ms (median)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.jpg"], "a.jpg does not end in .png"),
        (["--out", "nowhere/a.png"], "the folder nowhere of --out does not exist"),
        (["--sampler", "plms"], "unknown sampler 'plms'"),
        (["--batch", "9"], "need 18 rows"),
        (["--height", "41"], "choose 16 to 64 in steps of 8 px"),
        (["--deepcache", "2"], "the bundle has no shallow UNet; export it with --deepcache"),
        (["--deepcache", "0"], "deepcache 0 was asked for; choose 2 or more"),
        (["--guidance-steps", "1:3"], "guidance at the steps 1:3 was asked for; there are 2; choose FIRST:END"),
        (["--deepcache-center", "1"], "a centre of DeepCache was given without DeepCache"),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(
    sdc_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert sdc_run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_cannot_make_pictures_says_what_it_lacks(small_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no text_encoder, vae_decoder"):
        load(small_bundle, "ort-cpu")


def test_importing_the_runtime_is_quick() -> None:
    """Processor time, so that a busy neighbour does not count; Python's own start is left out."""
    program = "import time; begin = time.process_time(); import sdc.engines; print(time.process_time() - begin)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.3
