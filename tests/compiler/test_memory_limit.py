"""`--memory-limit`: what is chosen for a limit, what is refused, and that `sdc run` does it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from whole_bundle import carry_memory_report, write_whole_bundle

from sdc.compiler.byte_sizes import gibibytes, parse_bytes
from sdc.compiler.cli import main
from sdc.compiler.memory.engine_plan import Request
from sdc.compiler.memory.fit import RESERVE, fit_pictures
from sdc.compiler.memory.openvino_engines import PROCESS_BYTES
from sdc.engines.bundle import open_bundle
from sdc.engines.errors import InputError

PER_LATENT = {"unet": 100_000, "vae_decoder": 500_000}
"""Bytes of a buffer that the bundle says an engine needs for each latent of each row."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For `cpu` and `ort-cpu`; its report gives small engines large activations."""
    folder = write_whole_bundle(tmp_path_factory.mktemp("limit") / "small", targets=("ort-cpu", "cpu"))
    report = {}
    for component in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        elements = f"{PER_LATENT[component]}*B*H*W" if component in PER_LATENT else 64
        graph = {
            "weight_bytes": 0,
            "inputs": [],
            "buffers": [["x", elements, "INT8"], ["y", 64, "INT8"]],
            "outputs": [1],
            "steps": [["Any", [], [0], []], ["Any", [0], [1], []]],
        }
        report[component] = dict.fromkeys(("ort-cpu", "cpu"), graph)
    carry_memory_report(folder, report)
    return folder


def fitted(capsys: pytest.CaptureFixture[str], bundle: Path, megabytes: float, *arguments: str) -> dict[str, Any]:
    """What is chosen for a limit that leaves so many MB of activations."""
    limit = (PROCESS_BYTES + 1e6 * megabytes) / (1 - RESERVE)
    command = ["plan", str(bundle), "--json", "-", "--memory-limit", f"{limit:.0f}B", *arguments]
    assert main(command) == 0
    (fit,) = json.loads(capsys.readouterr().out)["fits"].values()
    assert fit["run_bytes"] <= (1 - RESERVE) * fit["limit_bytes"]
    return dict(fit["measures"])


@pytest.mark.parametrize(
    ("megabytes", "arguments", "measures"),
    [
        # 16 x 16 latents: 128 MB a picture in the decoder, 25.6 a row in the UNet, and 3 MB at most for all else.
        (131, ["--batch", "1"], {}),
        (120, ["--batch", "1"], {"tile_px": [56, 64]}),
        (103, ["--batch", "1"], {"tile_px": [48, 64]}),
        # The lowest strip is one of 16 px, 32 MB; without guidance the UNet takes less.
        (35, ["--guidance", "1"], {"tile_px": [16, 64]}),
        (30, ["--guidance", "1"], {"tile_px": [16, 56]}),
        # Four pictures with guidance: 204.8 MB in the UNet, 512 in the decoder.
        (520, ["--batch", "4"], {}),
        (420, ["--batch", "4"], {"decoded_at_once": 1}),
        (150, ["--batch", "4"], {"pictures_at_once": 2, "decoded_at_once": 1}),
        (60, ["--batch", "4"], {"pictures_at_once": 1, "decoded_at_once": 1, "tile_px": [24, 64]}),
        # Three pictures: two at a time would leave one.
        (140, ["--batch", "3"], {"pictures_at_once": 1, "decoded_at_once": 1}),
    ],
)
def test_the_least_that_fits_is_chosen(
    bundle: Path, capsys: pytest.CaptureFixture[str], megabytes: float, arguments: list[str], measures: dict[str, Any]
) -> None:
    assert fitted(capsys, bundle, megabytes, "--height", "64", "--width", "64", *arguments) == measures


def test_what_cannot_fit_names_the_engine_and_its_least(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(bundle), "--height", "64", "--width", "64", "--memory-limit"]
    assert main([*arguments, "150MB"]) == 2
    said = re.search(
        r"143 MiB are too little for 1 x 64x64 px: unet needs (\d+) MiB, whatever is done", capsys.readouterr().err
    )
    assert said is not None
    least = int(said[1])
    assert least * 2**20 == pytest.approx((PROCESS_BYTES + 51.2e6) / (1 - RESERVE), rel=0.02)
    assert main([*arguments, f"{least + 1}MiB"]) == 0, "that much does"
    assert main([*arguments, f"{least - 1}MiB"]) == 2


def test_targets_that_are_not_predicted_closely_are_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(bundle), "--target", "ort-cpu", "--memory-limit", "4GiB"]) == 2
    assert "what the target 'ort-cpu' takes in fp32 is not predicted closely enough" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["w8", "w4", "mixed"])
def test_precisions_whose_weights_may_be_expanded_are_refused(bundle: Path, precision: str) -> None:
    opened = open_bundle(bundle)
    other = replace(opened, manifest=replace(opened.manifest, precision=precision))
    with pytest.raises(InputError, match=f"takes in {precision} is not predicted closely enough"):
        fit_pictures(other, "cpu", Request(64, 64, 1, 5.0), 1 << 40)


def test_run_says_and_does_what_was_chosen(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit = (PROCESS_BYTES + 120e6) / (1 - RESERVE)
    picture, report = tmp_path / "a.png", tmp_path / "a.json"
    command = ["run", str(bundle), "--prompt", "a", "--steps", "1", "--height", "64", "--width", "64", "--seed", "1"]
    command += ["--target", "cpu", "--out", str(picture), "--json", str(report)]
    assert main([*command, "--memory-limit", f"{limit:.0f}B"]) == 0
    said = capsys.readouterr().err
    assert "memory: 2" in said
    assert "MiB: the VAE decodes in tiles of 64 x 56 px" in said
    assert json.loads(report.read_text())["pictures"][0]["measures"] == {"tile_px": [56, 64]}
    with Image.open(picture) as image:
        assert json.loads(image.text["sdc"])["measures"] == {"tile_px": [56, 64]}
    picture.unlink()
    assert main([*command, "--steps", "2", "--guidance-steps", "0:1", "--memory-limit", f"{limit:.0f}B"]) == 2
    assert "a memory limit was given, and guidance at some steps" in capsys.readouterr().err
    assert main([*command, "--memory-limit", "100 MiB"]) == 2
    assert "needs 1" in capsys.readouterr().err
    assert not picture.exists()


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.5GiB", 1610612736), ("4 GB", 4 * 10**9), ("900mib", 900 * 2**20), ("12kB", 12000), ("7B", 7)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "4", "GiB", "-1GiB", "1.5 parsecs", "0.1B", "1e3MB"])
def test_what_is_no_size_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"is no size|less than a byte"):
        parse_bytes(text)
    assert main(["plan", "bundle", f"--memory-limit={text}"]) == 2
    assert "--memory-limit" in capsys.readouterr().err


def test_sizes_are_written() -> None:
    assert [gibibytes(count) for count in (3 * 2**29, 2**28, 2**20)] == ["1.50 GiB", "256 MiB", "1 MiB"]
