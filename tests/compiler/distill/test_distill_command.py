"""`sdc distill` as users start it, in processes of their own: killed, started again, and refused."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from picture_folders import write_grey_pictures

from sdc.compiler.cli import main
from sdc.compiler.cli.training_arguments import open_pictures, parse_range, parse_size
from sdc.compiler.distill.pictures import TinyPictures
from sdc.compiler.load import load_checkpoint
from sdc.engines.errors import InputError

STEPS = 60


def command(model: Path, pictures: Path, out: Path, *more: str) -> list[str]:
    program = "import sys; from sdc.compiler.cli import main; sys.exit(main())"
    options = {
        "--model": model,
        "--data": pictures,
        "--out": out,
        "--rank": 2,
        "--steps": STEPS,
        "--batch": 3,
        "--guidance": "1.5:3",
        "--checkpoint-every": 7,
        "--grid-every": 1000,
        "--threads": 1,
    }
    return [sys.executable, "-c", program, "distill", "lcm-lora", *map(str, sum(options.items(), ())), *more]


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_run_goes_on_as_if_nothing_had_happened(model: Path, picture_folder: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    undisturbed = subprocess.Popen(command(model, picture_folder, whole), stderr=subprocess.DEVNULL)
    losses = tmp_path / "killed.work" / "losses.jsonl"
    process = subprocess.Popen(command(model, picture_folder, killed), stderr=subprocess.DEVNULL)
    try:
        while lines_of(losses) < 18 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        assert undisturbed.wait() == 0
    assert process.wait() == -signal.SIGKILL, "ended before it could be killed"
    assert not killed.exists()
    done = lines_of(losses)
    assert 18 <= done < STEPS
    again = subprocess.run(command(model, picture_folder, killed), check=True, capture_output=True, text=True)
    assert "going on after step" in again.stderr
    assert losses.read_bytes() == (tmp_path / "whole.work" / "losses.jsonl").read_bytes()
    assert killed.read_bytes() == whole.read_bytes()
    assert f"{STEPS} steps in" in again.stdout
    assert "% of the UNet's parameters trained" in again.stdout


@pytest.mark.slow
def test_bf16_and_gradient_checkpointing(model: Path, picture_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.safetensors"
    more = ("--precision", "bf16", "--gradient-checkpointing", "--size", "40x48", "--steps", "20")
    subprocess.run(command(model, picture_folder, out, *more), check=True, capture_output=True)
    assert lines_of(tmp_path / "half.work" / "losses.jsonl") == 20
    assert (tmp_path / "half.work" / "grid-000020.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nowhere"], "there is no folder nowhere of pictures"),
        (["--out", "lora.ckpt"], "end it in .safetensors"),
        (["--out", "nowhere/lora.safetensors"], "name a file in a folder that exists"),
        (["--guidance", "low"], "'low' is no range of guidance scales"),
        (["--size", "41x40"], "give HEIGHTxWIDTH in multiples of 8"),
        (["--rank", "0"], "rank must be 1 or more"),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--checkpoint-every", "0"], "checkpoint_every must be 1 or more"),
        (["--model", "nothing"], "unknown model 'nothing'"),
        (["--model", "tiny", "--size", "40x40"], "leave --size out"),
        (["--model", "tiny", "--data", "nowhere"], "Fashion-MNIST file nowhere"),
        (
            ["--model", "tiny", "--data", "."],
            "tiny learns from Fashion-MNIST alone, and . has no train-images-idx3-ubyte",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    change: list[str],
    message: str,
    model: Path,
    picture_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["distill", "lcm-lora", "--model", str(model), "--data", str(picture_folder), "--out", "a.safetensors"]
    assert main([*arguments, *change]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "something was written"


def test_the_pictures_of_tiny_are_taken_for_what_was_made_of_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the folder is called: what they are is told by the files, and whether they fit by their size."""
    write_grey_pictures(tmp_path, range(7))
    args = argparse.Namespace(model="smaller/tiny", data=tmp_path, size=None)
    pictures = open_pictures(args, load_checkpoint("tiny"), seed=0)
    assert isinstance(pictures, TinyPictures)
    assert len(pictures) == 7
    out = tmp_path / "a.safetensors"
    assert main(["distill", "lcm-lora", "--model", str(model), "--data", str(tmp_path), "--out", str(out)]) == 2
    assert "has pictures of 32 px, and" in capsys.readouterr().err


def test_the_kind_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill"]) == 2
    assert "KIND" in capsys.readouterr().err


def test_parse_range() -> None:
    assert parse_range("1.5:2") == (1.5, 2.0)
    assert parse_range("7") == (7.0, 7.0)
    for text in ("", "1:2:3", ":2", "a:b"):
        with pytest.raises(InputError, match="no range"):
            parse_range(text)


def test_parse_size() -> None:
    assert parse_size("512x768", multiple=64) == (512, 768)
    for text in ("512", "0x64", "-64x64", "64x64x64", "96x64"):
        with pytest.raises(InputError, match="multiples of 64"):
            parse_size(text, multiple=64)
