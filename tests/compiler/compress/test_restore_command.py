"""`sdc compress --elastic` and `sdc compress restore` as users start them, and what they refuse, leaving nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdc.compiler.cli import main
from sdc.compiler.compress.elastic import read_elastic
from sdc.compiler.load import load_checkpoint
from sdc.compiler.load.lora_files import read_lora_layers
from sdc.engines.bundle import open_bundle

PROMPTS = "a red coat\na blue shoe\n\na green bag\na grey shirt\na hat\na black boot\na sandal\na dress\n"


@pytest.fixture(scope="module")
def smaller(model: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with units that are off."""
    out = tmp_path_factory.mktemp("elastic") / "smaller"
    options = {
        "--model": model, "--data": picture_folder, "--out": out, "--parameters": 0.3, "--elastic": 0.4, "--rounds": 1,
        "--recover-steps": 6, "--probe-rows": 6, "--batch": 3, "--multiple": 1, "--guidance": "1:3", "--grid-every": 4,
        "--learning-rate": 1e-4, "--threads": 1,
    }  # fmt: skip
    assert main(["compress", *map(str, sum(options.items(), ()))]) == 0
    return out


@pytest.fixture(scope="module")
def bundle(smaller: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported from it."""
    out = tmp_path_factory.mktemp("bundle") / "base"
    export = ["export", "--model", str(smaller), "--precision", "fp32", "--target", "ort-cpu", "--out", str(out)]
    assert main([*export, "--no-hoist"]) == 0
    return out


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_has_zeros_where_units_are_off(smaller: Path) -> None:
    elastic, report = read_elastic(smaller), json.loads((smaller / "compression.json").read_text())
    weights = load_file(smaller / "unet" / "diffusion_pytorch_model.safetensors")
    saved = torch.load(smaller.with_name("smaller.work") / "checkpoint.pt", weights_only=True)["weights"]
    assert elastic.units > 10
    assert elastic.off == report["rounds"][-1]["elastic"]
    for layer, units in elastic.off.items():
        channels = [channel for unit in units for channel in unit]
        assert not weights[f"{layer}.weight"][:, channels].any()
        assert torch.equal(elastic.columns[layer], saved["average"][f"{layer}.weight"][:, channels])
        assert not torch.equal(elastic.columns[layer], saved["student"][f"{layer}.weight"][:, channels]), "not trained"
    assert len(elastic.errors) == 2, "of the captions of held-out pictures"
    assert min(elastic.errors) > 0
    assert elastic.size == (5, 10, 10)
    assert "are switched off; `sdc compress restore" in (smaller / "compression.txt").read_text()


@torch.no_grad()
def check_units(smaller: Path, lora: Path, closed_bundle: Path, open_bundle_folder: Path) -> None:
    """One bundle predicts what the network does, the other what it does with the weights of the chosen units."""
    unet, elastic = load_checkpoint(str(smaller)).unet(), read_elastic(smaller)
    torch.manual_seed(1)
    sample, timestep = torch.randn(2, *elastic.size), torch.tensor([300.0])
    states = torch.randn(2, 77, unet.config["cross_attention_dim"])
    closed = unet(sample, timestep, states).sample
    for name, layer in read_lora_layers(lora).items():
        part = unet.get_submodule(name.removeprefix("unet."))
        part.weight += layer.product().reshape(part.weight.shape)
    opened = unet(sample, timestep, states).sample
    assert (closed - opened).norm() > 1e-3 * closed.norm()
    feeds = {"sample": sample, "timestep": timestep, "encoder_hidden_states": states}
    for folder, expected in ((closed_bundle, closed), (open_bundle_folder, opened)):
        bundle = open_bundle(folder)
        with bundle.load_session("unet", bundle.target("ort-cpu")) as session:
            (found,) = session.run({name: each.numpy() for name, each in feeds.items()}).values()
        assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_units_are_switched_on_and_off_again(
    bundle: Path, smaller: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, lora, back = tmp_path / "new" / "on", tmp_path / "new" / "on.restored.safetensors", tmp_path / "back"
    before = contents(bundle)
    assert main(["compress", "restore", str(bundle), "--prompts", str(prompts), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "errors of 8 prompts: " in printed.out
    assert "units pay: error" in printed.out
    assert f"to undo: sdc lora {out} --remove {lora}" in printed.out
    assert contents(bundle) == before
    after = contents(out)
    assert {name for name in before if after.get(name) != before[name]} >= {"sdc.json", "request.json"}
    check_units(smaller, lora, bundle, out)
    assert not any(lora["few_steps"] for lora in json.loads(after["request.json"])["loras"])
    again = ["compress", "restore", str(out), "--prompts", str(prompts), "--out", str(tmp_path / "twice")]
    assert main(again) == 2
    assert f"has elastic channels switched on already, by {lora}" in capsys.readouterr().err
    assert main(["lora", str(out), "--remove", str(lora), "--out", str(back)]) == 0
    assert contents(back) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": "one\ntwo\nthree"}, "3 different prompts are too few"),
        ({"prompts": "one\ntwo\nthree\nthree\none"}, "3 different prompts are too few"),
        ({"out": "inside"}, "is inside the bundle"),
        ({"out": "prompts.txt"}, "prompts.txt exists"),
        ({"lora": "prompts.txt"}, "prompts.txt is there already"),
        ({"lora": "on/units.safetensors"}, "where the bundle shall be"),
        ({"lora": "units.pt"}, "is a pickle"),
    ],
)
def test_what_makes_no_sense_is_refused(
    bundle: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    message: str,
) -> None:
    if "prompts" in change:
        prompts.write_text(change["prompts"])
    out = bundle / "x" if change.get("out") == "inside" else tmp_path / change.get("out", "on")
    more = ["--lora", str(tmp_path / change["lora"])] if "lora" in change else []
    before = contents(tmp_path)
    assert main(["compress", "restore", str(bundle), "--prompts", str(prompts), "--out", str(out), *more]) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_folder_that_is_called_like_a_model_is_not_taken_for_it(
    smaller: Path,
    bundle: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bundle is of tiny, and beside it lies a folder of that name with switched channels."""
    of_tiny = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    request, manifest = (json.loads((of_tiny / name).read_text()) for name in ("request.json", "sdc.json"))
    content = json.dumps({**request, "model": "tiny"}).encode()
    manifest["files"]["request.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (of_tiny / "request.json").write_bytes(content)
    (of_tiny / "sdc.json").write_text(json.dumps(manifest))
    shutil.copytree(smaller, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    arguments = ["--prompts", str(prompts), "--out", str(tmp_path / "on")]
    assert main(["compress", "restore", str(of_tiny), *arguments]) == 2
    assert "was made from tiny, which has no channels that are switched off" in capsys.readouterr().err


def test_models_without_such_channels_or_without_their_teacher_are_refused(
    model: Path, smaller: Path, bundle: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    export = ["export", "--model", str(model), "--precision", "fp32", "--target", "ort-cpu", "--out", str(whole)]
    assert main(export) == 0
    arguments = ["--prompts", str(prompts), "--out", str(tmp_path / "on")]
    assert main(["compress", "restore", str(whole), *arguments]) == 2
    assert "has no channels that are switched off" in capsys.readouterr().err
    hidden = model.with_name("hidden")
    shutil.move(model, hidden)
    try:
        assert main(["compress", "restore", str(bundle), *arguments]) == 2
    finally:
        shutil.move(hidden, model)
    assert f"the model that was compressed, {model}, is needed" in capsys.readouterr().err
    assert not (tmp_path / "on").exists()


def test_a_model_that_was_compressed_again_is_refused(
    smaller: Path, bundle: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = smaller / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        out = tmp_path / "on"
        assert main(["compress", "restore", str(bundle), "--prompts", str(prompts), "--out", str(out)]) == 2
    finally:
        weights.write_bytes(whole)
    assert f"{smaller} is another model now than {bundle} was made from" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--elastic", "0.7"], "share of elastic channels must be 0 to 0.5, found 0.7"),
        (["--elastic", "nan"], "share of elastic channels must be"),
        (["--elastic", "--sparsity", "2:4"], "channels stay switched off where some are removed"),
        (["--elastic", "--parameters", "0.3", "--low-rank", "0.9"], "channels stay switched off where some are"),
    ],
)
def test_other_shares_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["compress", "--model", str(model), "--out", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "out"])
def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str], name: str) -> None:
    given = {"model": "tiny", "out": "nowhere"}
    del given[name]
    assert main(["compress", *(f"--{key}={value}" for key, value in given.items())]) == 2
    assert f"--{name} is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "before",
    [
        ("--model", "tiny"),
        ("--rounds", "2"),
        ("--elastic", "0.1"),
        ("--out", "y"),
        ("--weights", "random"),
        ("--seed", "3"),
    ],
)
def test_options_of_compress_are_refused_and_not_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: tuple[str, ...]
) -> None:
    prompts = tmp_path / "prompts.txt"
    assert main(["compress", *before, "restore", str(tmp_path), "--prompts", str(prompts), "--out", "x"]) == 2
    assert f"{before[0]} stands before `restore`" in capsys.readouterr().err
