"""`sdc compress` as users start it, in processes of their own: killed, started again, and refused."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from minimal_pipeline import save_minimal_pipeline
from picture_folders import write_plain_pictures
from safetensors.torch import load_file

from sdc.compiler.cli import main
from sdc.compiler.compress.elastic import close_units, read_elastic
from sdc.compiler.compress.prune import UnetState
from sdc.compiler.load import load_checkpoint
from sdc.passes.simplify.factorise_weights import low_rank_factors
from sdc.passes.sparse_weights import first_dense_block

ROUND_STEPS, RECOVER_STEPS = 12, 20
ELASTIC = ("--elastic", "0.2")
WHEN = ("pruned", "recovered")


def command(model: Path, pictures: Path, out: Path, *more: str) -> list[str]:
    program = "import sys; from sdc.compiler.cli import main; sys.exit(main())"
    options = {
        "--model": model,
        "--data": pictures,
        "--out": out,
        "--parameters": 0.35,
        "--rounds": 2,
        "--round-steps": ROUND_STEPS,
        "--recover-steps": RECOVER_STEPS,
        "--probe-rows": 6,
        "--batch": 3,
        "--multiple": 1,
        "--learning-rate": 0.001,
        "--guidance": "1:3",
        "--checkpoint-every": 5,
        "--grid-every": 1000,
        "--threads": 1,
    }
    return [sys.executable, "-c", program, "compress", *map(str, sum(options.items(), ())), *more]


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_until_killed(arguments: list[str], losses: Path, lines: int) -> None:
    """Start, and kill once so many losses are written."""
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    try:
        while lines_of(losses) < lines and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "ended before it could be killed"


@pytest.fixture(scope="module")
def whole(model: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "smaller"
    subprocess.run(command(model, picture_folder, out, *ELASTIC), check=True, capture_output=True)
    return out


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    whole: Path, model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    """Killed within the recovery of each round: the losses and all files are the same."""
    out, losses = tmp_path / "smaller", tmp_path / "smaller.work" / "losses.jsonl"
    arguments = command(model, picture_folder, out, *ELASTIC)
    for lines in (7, ROUND_STEPS + 8):
        run_until_killed(arguments, losses, lines)
        assert lines <= lines_of(losses) < ROUND_STEPS + RECOVER_STEPS
        assert not out.exists()
    again = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert "going on after round 2, step" in again.stderr
    assert losses.read_bytes() == (whole.with_name("smaller.work") / "losses.jsonl").read_bytes()
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    for file in files:
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file


def test_the_report_says_what_was_done(whole: Path, model: Path) -> None:
    report = json.loads((whole / "compression.json").read_text())
    before, after = (
        sum(each.numel() for each in load_checkpoint(str(folder)).unet().parameters()) for folder in (model, whole)
    )
    assert (report["parameters_before"], report["parameters_after"]) == (before, after)
    assert 0.35 <= report["removed_share"] < 0.45
    assert [each["round"] for each in report["rounds"]] == [1, 2]
    for each in report["rounds"]:
        assert len(each["pruned"]["timesteps"]) == 10
        kept = [group["kept"] / group["channels"] for group in each["groups"]]
        assert len({round(share, 3) for share in kept}) > 2, "one ratio for all"
    last = report["rounds"][-1]
    pruned, recovered = (sum(row["difference_from_teacher"] for row in last[when]["timesteps"]) for when in WHEN)
    assert recovered < 0.95 * pruned, "recovery did not help"
    text = (whole / "compression.txt").read_text()
    assert f"{100 * report['removed_share']:.1f} % fewer" in text
    assert f"{report['rounds'][1]['recovered']['lost_db']:.2f}" in text
    assert "2 rounds with 12 steps of recovery between them, 20 steps of recovery at the end" in text


def test_the_result_is_the_average_of_the_weights(whole: Path) -> None:
    saved = torch.load(whole.with_name("smaller.work") / "checkpoint.pt", weights_only=True)["weights"]
    written = load_file(whole / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(saved["student"][name], written[name]) for name in written)
    average = close_units(UnetState({}, saved["average"]), read_elastic(whole).off).weights
    assert all(torch.equal(average[name], written[name]) for name in written)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an untrained model whose UNet has two layers in each stage."""
    return save_minimal_pipeline(tmp_path_factory.mktemp("two"), guidance_width=None, unet_layers=2)


@pytest.fixture(scope="module")
def sparse(model: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that pruned once and left two of every four weights, by activation."""
    out = tmp_path_factory.mktemp("sparse") / "smaller"
    more = ("--sparsity", "2:4", "--rounds", "1", "--recover-steps", "12", "--multiple", "8", "--parameters", "0.2")
    subprocess.run(command(model, picture_folder, out, *more), check=True, capture_output=True)
    return out


def test_zeros_outlast_recovery_and_being_killed(
    sparse: Path, model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    """Every block of four is looked at, in the written weights; a run killed within the recovery gives the same."""
    weights = load_file(sparse / "unet" / "diffusion_pytorch_model.safetensors")
    found = json.loads((sparse / "compression.json").read_text())["rounds"][-1]["sparsity"]
    for name, share in found["layers"].items():
        assert share == 0.5
        assert first_dense_block(weights[f"{name}.weight"].numpy(), 1) is None, name
    assert sum(int((weights[f"{name}.weight"] == 0).sum()) for name in found["layers"]) == found["zeros"]
    assert found["dense"]["conv_in"] == "the first convolution"
    text = (sparse / "compression.txt").read_text()
    assert f"{found['zeros']:,} weights are zero" in text
    assert "the last convolution: conv_out" in text
    assert "one round, 12 steps of recovery at the end" in text
    assert re.search("SNR, pruned +less +SNR, sparse +less +SNR, recovered +less", text)

    out, losses = tmp_path / "smaller", tmp_path / "smaller.work" / "losses.jsonl"
    more = ("--sparsity", "2:4", "--rounds", "1", "--recover-steps", "12", "--multiple", "8", "--parameters", "0.2")
    arguments = command(model, picture_folder, out, *more)
    run_until_killed(arguments, losses, 7)
    subprocess.run(arguments, check=True, capture_output=True)
    assert (out / "compression.json").read_bytes() == (sparse / "compression.json").read_bytes()
    again = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_recovery_moves_what_is_not_zero(sparse: Path) -> None:
    saved = torch.load(sparse.with_name("smaller.work") / "checkpoint.pt", weights_only=True)["weights"]
    for name, mask in saved["masks"].items():
        assert not saved["student"][name][~mask].any()
        assert (saved["student"][name] != saved["average"][name])[mask].float().mean() > 0.5


def test_sparsity_alone_leaves_a_folder_that_diffusers_loads(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sparse"
    alone = ["--sparsity", "0.7", "--sparsity-scores", "magnitude", "--recover-steps", "0"]
    assert main(["compress", "--model", str(model), "--out", str(out), *alone]) == 0
    printed = capsys.readouterr().out
    assert "no channels removed" in printed
    assert "zeros anywhere make nothing faster" in printed
    unet = UNet2DConditionModel.from_pretrained(out / "unet")
    assert float((unet.mid_block.resnets[0].conv1.weight == 0).float().mean()) == pytest.approx(0.7, abs=1e-3)
    assert unet.conv_in.weight.all()


def test_low_rank_outlasts_recovery(model: Path, picture_folder: Path, tmp_path: Path) -> None:
    """diffusers loads the folder, whose weights have the ranks that its configuration names."""
    out = tmp_path / "low"
    more = ("--parameters", "0", "--low-rank", "0.9", "--recover-steps", "3")
    printed = subprocess.run(
        command(model, picture_folder, out, *more), check=True, capture_output=True, text=True
    ).stdout
    assert re.search("SNR, in low rank +less +SNR, recovered +less", printed)
    found = json.loads((out / "compression.json").read_text())["rounds"][-1]["low_rank"]
    assert f"{len(found['layers'])} layers of {found['weights']:,} weights, {found['in_factors']:,} once" in printed
    assert found["dense"]["conv_out"] == "the last convolution"
    unet, whole = (UNet2DConditionModel.from_pretrained(folder / "unet") for folder in (out, model))
    assert len(found["layers"]) > 10
    for name, layer in found["layers"].items():
        factors = low_rank_factors(unet.get_submodule(name).weight.detach().flatten(1).numpy(), 1e-5)
        assert factors is not None, name
        assert factors[0].shape[1] == layer["rank"], name
    saved = torch.load(tmp_path / "low.work" / "checkpoint.pt", weights_only=True)["weights"]
    for name, span in saved["spans"].items():
        begun = span @ (span.T @ whole.get_parameter(name).detach().flatten(1))
        assert (saved["student"][name].flatten(1) - begun).abs().max() > 1e-6, f"{name} did not recover"


def test_a_budget_of_ranks_is_kept_by_a_killed_run_too(model: Path, picture_folder: Path, tmp_path: Path) -> None:
    """Killed in the midst of its measurements, it measures the same again; the report has them."""
    outs, more = [tmp_path / name for name in ("low", "again")], ("--parameters", "0", "--low-rank", "0.01dB")
    commands = [command(model, picture_folder, out, *more, "--recover-steps", "2") for out in outs]
    printed = subprocess.run(commands[0], check=True, capture_output=True, text=True)
    with subprocess.Popen(commands[1], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        measured = (line for line in process.stderr if "layers of low rank: the SNR is" in line)
        assert [next(measured) for _ in range(3)]
        process.kill()
    assert not outs[1].exists()
    subprocess.run(commands[1], check=True, capture_output=True)
    for file in ("compression.json", "unet/diffusion_pytorch_model.safetensors"):
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes(), file
    round_ = json.loads((outs[0] / "compression.json").read_text())["rounds"][-1]
    found, whole_db = round_["low_rank"], round_["in low rank"]["lost_db"]
    assert printed.stderr.count("layers of low rank: the SNR is") == len(found["trials"]) == 6
    assert found["budget_db"] == 0.01
    assert found["lost_db"] == pytest.approx(whole_db, abs=1e-3), "nothing was done to the network before"
    assert found["lost_db"] <= 0.01
    assert f"{found['energy']:.6g} of the energy ({found['lost_db']:.3f} dB less, of 0.01dB allowed)" in printed.stdout


def test_a_budget_of_ranks_needs_pictures_that_are_held_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    write_plain_pictures(pictures, {f"{index}.png": (40, 40) for index in range(19)})
    arguments = ["compress", "--model", str(model), "--out", str(tmp_path / "out"), "--recover-steps", "0"]
    arguments += ["--low-rank", "1dB", "--low-rank-by", "plain"]
    assert main(arguments) == 2
    assert "--low-rank 1dB is measured on pictures; give --data, or a share of energy" in capsys.readouterr().err
    assert main([*arguments, "--data", str(pictures)]) == 2
    assert "held out, one in 20, and there are 19; give more pictures, or a share" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_data_by_weights_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "smaller"
    alone = ["--importance", "magnitude", "--budgets", "uniform", "--recover-steps", "0", "--round-steps", "0"]
    assert main(["compress", "--model", str(model), "--out", str(out), "--parameters", "0.3", *alone]) == 0
    assert "% fewer" in capsys.readouterr().out
    assert load_checkpoint(str(out)).unet() is not None
    again = ["compress", "--model", str(out), "--out", str(tmp_path / "smallest"), "--parameters", "0.1", *alone]
    assert main(again) == 0, "a pruned model can be pruned again"


def test_blocks_alone_go_and_the_rest_recovers(two_layers: Path, picture_folder: Path, tmp_path: Path) -> None:
    """diffusers loads the folder; no channel is removed unless it is asked for."""
    out = tmp_path / "fewer"
    more = ("--student", "small", "--recover-steps", "12")
    arguments = command(two_layers, picture_folder, out, *more)
    place = arguments.index("--parameters")
    printed = subprocess.run(
        arguments[:place] + arguments[place + 2 :], check=True, capture_output=True, text=True
    ).stdout
    assert "no channels removed, student small, 12 steps of recovery" in printed
    assert re.search("SNR, with fewer blocks +less +SNR, recovered +less", printed)
    (only,) = json.loads((out / "compression.json").read_text())["rounds"]
    before, after = (
        sum(row["difference_from_teacher"] for row in only[when]["timesteps"])
        for when in ("with fewer blocks", "recovered")
    )
    assert after < 0.95 * before, "recovery did not help"
    unet = UNet2DConditionModel.from_pretrained(out / "unet")
    assert unet.config["layers_per_block"] == 1
    assert unet.mid_block is None
    assert unet.config["block_out_channels"] == [12, 24]


def resnet_calls(model: Path, pictures: Path, out: Path, *more: str) -> tuple[int, list[float]]:
    """How often residual blocks begin in a short compression, and its losses; run again, they need not end."""
    calls: list[str] = []

    def count(module: torch.nn.Module, *_: object) -> None:
        if isinstance(module, ResnetBlock2D):
            calls.append("")

    steps = ("--rounds", "1", "--recover-steps", "3", "--importance", "magnitude", "--budgets", "uniform")
    with torch.nn.modules.module.register_module_forward_pre_hook(count):
        assert main([*command(model, pictures, out, *steps, *more)[3:]]) == 0
    losses = (out.with_name(f"{out.name}.work") / "losses.jsonl").read_text().splitlines()
    return len(calls), [json.loads(line)["loss"] for line in losses]


def test_gradient_checkpointing_runs_blocks_again_to_the_same_losses(
    model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    calls, losses = resnet_calls(model, picture_folder, tmp_path / "kept")
    more, again = resnet_calls(model, picture_folder, tmp_path / "again", "--gradient-checkpointing")
    blocks = sum(isinstance(each, ResnetBlock2D) for each in load_checkpoint(str(model)).unet().modules())
    assert more == calls + 3 * (blocks - 1), "all but the middle's first block, which diffusers keeps"
    assert again == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
def test_bf16_and_gradient_checkpointing(model: Path, picture_folder: Path, tmp_path: Path) -> None:
    more = ("--precision", "bf16", "--gradient-checkpointing", "--size", "40x48")
    subprocess.run(command(model, picture_folder, tmp_path / "half", *more), check=True, capture_output=True)
    assert lines_of(tmp_path / "half.work" / "losses.jsonl") == ROUND_STEPS + RECOVER_STEPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--parameters", "0"], "share of parameters must be between 0 and 1, found 0"),
        (["--parameters", "1"], "share of parameters must be between 0 and 1, found 1"),
        (["--parameters", "nan"], "share of parameters must be between 0 and 1"),
        (["--parameters", "0.95"], "parameters shall go, but at most"),
        (["--multiple", "3"], "channels cannot be multiples of 3"),
        (["--rounds", "0"], "rounds must be 1 or more, found 0"),
        (["--recover-steps", "5"], "pictures are needed"),
        (["--importance", "fisher"], "pictures are needed to measure and to recover; give --data"),
        (["--sparsity", "2:4"], "pictures are needed to measure and to recover; give --data"),
        (["--sparsity", "1:2"], "'1:2' is no sparsity; give 2:4, or a share between 0 and 1"),
        (["--guidance", "0:2"], "guidance 0:2 is no range"),
        (["--learning-rate", "nan"], "learning rate must be above 0"),
        (["--student", "base"], "BK-SDM's students are of UNets with two layers a block"),
        (["--out", "nowhere/out"], "name a folder in one that exists"),
        (["--out", "."], ". is there already; remove it"),
        (["--model", "nothing"], "unknown model 'nothing'"),
        (["--data", "nowhere"], "there is no folder nowhere of pictures"),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--work", "out/work"], "the run's folder out/work is in the result's place, out; name another --work"),
        (["--work", "out"], "the run's folder out is in the result's place, out; name another --work"),
    ],
)
def test_what_makes_no_sense_is_refused(
    change: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["compress", "--model", str(model), "--out", "out", "--importance", "magnitude", "--budgets", "uniform"]
    assert main([*arguments, "--recover-steps", "0", "--round-steps", "0", *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_with_guidance_as_an_input_is_refused(
    minimal_folder: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", "--model", str(minimal_folder), "--data", str(picture_folder)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "is a latent consistency model; compress its base model" in capsys.readouterr().err
