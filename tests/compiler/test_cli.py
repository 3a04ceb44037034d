"""Every error of a command is one message and an exit code; every command imports only what it needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdc.compiler.cli import COMMANDS, main
from sdc.compiler.cli import doctor as doctor_command
from sdc.compiler.cli.export import request_from_arguments
from sdc.engines.errors import TargetError

HEAVY = ("torch", "onnx", "onnx_ir", "diffusers", "transformers", "openvino", "onnxruntime", "tensorrt_rtx")


def sdc(*arguments: str, **keywords: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from sdc.compiler.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **keywords)  # type: ignore[call-overload]


def raise_in_doctor(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(_: object) -> int:
        raise error

    monkeypatch.setattr(doctor_command, "run", run)


def test_an_error_of_the_caller_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_in_doctor(monkeypatch, TargetError("expected a GPU, found none", hint="buy one"))
    assert main(["doctor"]) == TargetError.exit_code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "sdc: expected a GPU, found none; buy one\n"


def test_an_error_of_ours_tells_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_in_doctor(monkeypatch, ZeroDivisionError("one by zero"))
    assert main(["doctor"]) == 70
    assert capsys.readouterr().err == (
        "sdc: unexpected ZeroDivisionError: one by zero; run with --verbose for the traceback\n"
    )
    assert main(["doctor", "--verbose"]) == 70
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("sdc: unexpected ZeroDivisionError: one by zero\n")


def test_a_path_that_the_system_refuses_is_the_callers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = 300 * "a"
    assert main(["run", str(tmp_path / name), "--prompt", "a bag"]) == 2
    error = capsys.readouterr().err
    assert error == f"sdc: {tmp_path / name / 'sdc.json'} cannot be used: File name too long\n"


def test_other_errors_of_the_system_are_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_in_doctor(monkeypatch, FileNotFoundError(2, "No such file", "forgotten"))
    assert main(["doctor"]) == 70
    assert "unexpected FileNotFoundError" in capsys.readouterr().err


def test_an_interruption_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raise_in_doctor(monkeypatch, KeyboardInterrupt())
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "sdc: interrupted\n"


def send_to_itself(number: signal.Signals) -> None:
    """Signal this process, which runs other tests too, unless nothing heeds it; then wait for it to arrive."""
    assert threading.current_thread() is threading.main_thread()
    assert callable(signal.getsignal(number)), f"{number} would end the process"
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    os.kill(os.getpid(), number)
    time.sleep(30)


def test_termination_unwinds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    def run(_: object) -> int:
        try:
            send_to_itself(signal.SIGTERM)
        finally:
            cleaned.append(True)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(doctor_command, "run", run)
    assert main(["doctor"]) == 143
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("heeded_interrupt")
@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_that_a_library_turned_into_its_own_error_is_still_a_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int, said: str
) -> None:
    def run(_: object) -> int:
        try:
            send_to_itself(number)
        except BaseException as stop:
            raise RuntimeError("callback failed") from stop
        return 0

    before = signal.getsignal(number)
    monkeypatch.setattr(doctor_command, "run", run)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == f"sdc: {said}\n"
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell without job control starts what runs in the background with SIGINT ignored."""

    def run(_: object) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(doctor_command, "run", run)
        assert main(["doctor"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_in_doctor(monkeypatch, ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == (
        "sdc: `sdc doctor` needs the package torch, which is not installed; pip install 'sdc[compile]'\n"
    )


def test_the_help_lists_every_command_and_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom sdc.compiler.cli import main\n"
        "assert main(['--help']) == 0\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *text, heavy = result.stdout.strip().splitlines()
    for command in COMMANDS:
        assert any(line.split()[:1] == [command] for line in text), command
    assert heavy == "[]"


def test_the_version_and_an_unknown_command() -> None:
    result = sdc("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("sdc 0.")
    result = sdc("paint")
    assert result.returncode == 2
    assert "invalid choice: 'paint'" in result.stderr
    assert sdc().returncode == 2


def test_a_closed_pipe_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    program = (
        "import sys\nfrom sdc.compiler.cli import doctor, main\n"
        "doctor.run = lambda args: print('a line') or 0\n"
        "sys.exit(main(['doctor']))"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert result.returncode == 141
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny", "--precision", "fp4"], "unknown precision 'fp4'; choose one of fp32, fp16, bf16, int8"),
        (["--model", "tiny", "--target", "cpu,gpu"], "unknown target 'gpu'; choose from"),
        (["--model", "tiny", "--target", ","], "no target was given"),
        (["--model", "tiny", "--seed", "3"], "--seed is the seed of random weights; add --weights random"),
        (["--model", "tiny", "--calibration-prompts", "x.txt"], "calibration options have no effect on fp16"),
        (["--model", "tiny", "--calibration", "entropy"], "calibration options have no effect on fp16"),
        (["--model", "tiny", "--calibration", "kl"], "unknown calibration 'kl'; choose one of max, percentile"),
        (["--model", "tiny", "--calibration", "mse:3"], "'mse' takes no number"),
        (["--model", "tiny", "--smooth-quant", "much"], "--smooth-quant 'much' is no number"),
        (["--model", "tiny", "--smooth-quant", "1.5"], "SmoothQuant's alpha is 1.5; give a number from 0 to 1"),
        (
            ["--model", "tiny", "--precision", "int8", "--target", "cpu,rtx", "--activations", "asymmetric"],
            "the target 'rtx' runs symmetric activation ranges only; add --activations symmetric",
        ),
        (
            ["--model", "tiny", "--precision", "int8", "--target", "cpu,ort-cpu", "--calibration", "dynamic"],
            "the target 'cpu' runs no dynamic ranges; add --target ort-cpu, or another --calibration",
        ),
        (
            ["--model", "tiny", "--calibration-table", "a.json", "--calibration-prompts", "x.txt"],
            "--calibration-prompts has no effect on a calibration that is at hand",
        ),
        (
            ["--model", "tiny", "--calibration-table", "a.json", "--calibration-size", "64"],
            "--calibration-size has no effect on a calibration that is at hand",
        ),
        (["--model", "tiny", "--deepcache", "-1"], "--deepcache -1 is no depth; choose 0 or more"),
        (["--model", "tiny", "--calibration-steps", "0"], "--calibration-steps is 0; give a positive number"),
        (
            ["--model", "tiny", "--calibration-table", "a.json", "--smooth-quant", "0.8"],
            "--smooth-quant has no effect on a calibration that is at hand",
        ),
    ],
)
def test_arguments_of_export_that_make_no_sense(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"sdc: {message}")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_is_one_message(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", "--model", str(tmp_path / "none"), "--target", "cpu", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "none") in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert [path for path in tmp_path.iterdir() if path != cache] == []


def test_a_request_is_what_the_arguments_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from sdc.compiler.cli import export

    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    monkeypatch.chdir(tmp_path)
    request = request_from_arguments(parser.parse_args(["--model", "someone/some-model.v2"]))
    assert request.out == Path("build/some-model.v2-fp16")
    assert [target.name for target in request.targets] == ["cpu", "rtx"]
    assert request.fuse
    assert request.deepcache is None
    for arguments, depth in ((["--deepcache"], 0), (["--deepcache", "4"], 4)):
        assert request_from_arguments(parser.parse_args(["--model", "tiny", *arguments])).deepcache == depth
    request = request_from_arguments(
        parser.parse_args(
            [
                *("--model=dir/real.safetensors", "--precision=int8", "--weights=random", "--seed=9", "--no-fuse"),
                *("--target=sm89", "--lora=a.safetensors:0.5", "--lora=b.safetensors"),
            ]
        )
    )
    assert request.out == Path("build/real-int8")
    assert (request.source.weights, request.source.seed) == ("random", 9)
    assert request.source.loras == ("a.safetensors:0.5", "b.safetensors")
    assert not request.fuse


def test_json_is_alone_on_standard_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With `test_compile`'s bundle it is checked in full; here, that an error leaves standard output empty."""
    result = sdc("export", "--model", "tiny", "--precision", "none", "--json")
    assert result.stdout == ""
    assert result.returncode == 2
    assert json.dumps("none").strip('"') in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["run", "{}", "--prompt", "x"], ["inspect", "{}"], ["eval", "{}"], ["compare", "{}", "{}"]],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_bundle_that_is_not_there_is_an_argument_that_cannot_be_used(
    arguments: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main([each.format(tmp_path / name) for each in arguments]) == 2
    assert str(tmp_path / name) in capsys.readouterr().err
