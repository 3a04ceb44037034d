"""`sdc lora`: bundles that are made again from the checkpoint, to the byte; and what it refuses, leaving nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from minimal_pipeline import save_minimal_pipeline
from safetensors.torch import save_file

from sdc.compiler.calibration.table_file import read_table
from sdc.compiler.load import load_checkpoint
from sdc.engines.bundle import open_bundle

MAIN = [sys.executable, "-c", "import sys; from sdc.compiler.cli import main; sys.exit(main())"]


@dataclass(frozen=True)
class Workplace:
    """A model, three LoRAs for it, and one cache.

    Attributes:
        folder: holds everything.
        model: an ordinary UNet, whose guidance is no input.
    """

    folder: Path
    model: Path

    def start(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "SDC_CACHE": str(self.folder / "cache")}
        return subprocess.run([*MAIN, *map(str, arguments)], env=environment, capture_output=True, text=True)

    def __call__(self, *arguments: str | Path) -> str:
        done = self.start(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stderr + done.stdout

    def export(self, out: Path, *options: str | Path, precision: str | Path = "int8") -> str:
        return self(
            *("export", "--model", self.model, "--precision", precision, "--target", "ort-cpu"),
            *("--out", out, *options),
        )

    def refusal(self, *arguments: str | Path) -> str:
        """What is said of arguments that are refused."""
        done = self.start("lora", *arguments)
        assert done.returncode == 2, done.stderr
        return done.stderr

    def lora(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def write_lora(path: Path, model: Path, ends: tuple[str, ...], *, network: str = "unet", seed: int = 1) -> None:
    """A LoRA of rank 2 for the layers whose names end like this, strong enough to be seen."""
    checkpoint = load_checkpoint(str(model))
    module = checkpoint.unet() if network == "unet" else checkpoint.text_encoder()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, part in module.named_modules():
        if name.endswith(ends):
            weight = part.get_parameter("weight")
            tensors[f"{network}.{name}.lora_A.weight"] = 0.3 * torch.randn(2, *weight.shape[1:], generator=generator)
            up = 0.3 * torch.randn(weight.shape[0], 2, *(1,) * (weight.ndim - 2), generator=generator)
            tensors[f"{network}.{name}.lora_B.weight"] = up
    save_file(tensors, path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With an int8 bundle "base" without LoRAs."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "models").mkdir()
    place = Workplace(folder, save_minimal_pipeline(folder / "models", guidance_width=None))
    write_lora(place.lora("one"), place.model, ("to_q", "to_v", "ff.net.0.proj", "conv1"))
    write_lora(place.lora("two"), place.model, ("to_k", "proj_in", "conv2"), seed=2)
    write_lora(place.lora("text"), place.model, ("q_proj", "fc1"), network="text_encoder")
    place.export(folder / "base")
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unlike(left: Path, right: Path) -> set[str]:
    """Files that two bundles do not share, or that differ."""
    ours, theirs = contents(left), contents(right)
    return {name for name in ours | theirs if ours.get(name) != theirs.get(name)}


def made_anew(said: str) -> set[str]:
    """Stages that did not come from the cache."""
    return {line.split("  ")[0] for line in said.splitlines() if line.endswith(" GB")}


def test_adding_and_removing_gives_the_first_bundle(place: Workplace, tmp_path: Path) -> None:
    base = place.folder / "base"
    before = contents(base)
    one, both, two, none = (tmp_path / name for name in ("one", "both", "two", "none"))
    place("lora", base, "--add", f"{place.lora('one')}:0.7", "--out", one)
    said = place("lora", one, "--add", place.lora("two"), "--out", both)
    assert place.lora("two").name not in said
    place("lora", both, "--remove", "one.safetensors", "--out", two)
    place("lora", both, "--clear", "--out", none)
    assert unlike(none, base) == set()
    assert contents(base) == before
    assert [(each.file, each.scale) for each in open_bundle(both).manifest.model.loras] == [
        ("one.safetensors", 0.7),
        ("two.safetensors", 1.0),
    ]
    weights = {(bundle / "unet/model.onnx_data").read_bytes() for bundle in (base, one, both, two)}
    assert len(weights) == 4
    place("lora", two, "--add", f"{place.lora('one')}:0.7", "--out", tmp_path / "turned")
    place("lora", tmp_path / "turned", "--remove", place.lora("two"), "--out", tmp_path / "again")
    assert unlike(tmp_path / "again", one) == set()


def test_it_is_what_an_export_with_the_same_calibration_makes(place: Workplace, tmp_path: Path) -> None:
    made, exported = tmp_path / "made", tmp_path / "exported"
    lora = f"{place.lora('two')}:-1.5"
    place("lora", place.folder / "base", "--add", lora, "--out", made)
    fresh = Workplace(tmp_path, place.model)  # with a cache of its own
    fresh.export(exported, "--lora", lora, "--calibration-table", made / "calibration/unet.json")
    assert unlike(made, exported) == set()


def test_only_what_the_lora_changes_is_made_again(place: Workplace, tmp_path: Path) -> None:
    said = place("lora", place.folder / "base", "--add", f"{place.lora('one')}:0.3", "--out", tmp_path / "one")
    unet = {"load", "export unet", "calibrate unet", "check fp16", "build unet for ort-cpu", "write bundle"}
    assert made_anew(said) == unet
    said = place("lora", place.folder / "base", "--add", f"{place.lora('text')}:0.3", "--out", tmp_path / "text")
    assert "export unet" not in made_anew(said)
    changed = {name.split("/")[0] for name in unlike(place.folder / "base", tmp_path / "text")}
    assert changed == {"text_encoder", "sdc.json", "request.json", "reports"}


def test_ranges_are_those_of_the_first_calibration(place: Workplace, tmp_path: Path) -> None:
    place("lora", place.folder / "base", "--add", place.lora("one"), "--out", tmp_path / "one")
    before, after = (read_table(each / "calibration/unet.json") for each in (place.folder / "base", tmp_path / "one"))
    assert after.ranges == before.ranges
    assert after.tensors == before.tensors
    assert after.graph_digest != before.graph_digest
    assert before.smoothing is not None
    assert after.smoothing is not None
    assert after.smoothing.factors == before.smoothing.factors


def test_options_of_the_export_are_kept(place: Workplace, tmp_path: Path) -> None:
    options = (
        "--deepcache",
        "1",
        "--no-fuse",
        "--no-bias-correction",
        "--calibration",
        "max",
        "--smooth-quant",
        "0.5:1",
    )
    place.export(tmp_path / "base", *options)
    place("lora", tmp_path / "base", "--add", place.lora("one"), "--out", tmp_path / "one")
    place("lora", tmp_path / "one", "--clear", "--out", tmp_path / "back")
    assert unlike(tmp_path / "base", tmp_path / "back") == set()
    table = read_table(tmp_path / "base/calibration/unet.json")
    assert table.smoothing is not None
    assert table.smoothing.factors, "nothing was smoothed, so that it shows nothing"


def test_shards_without_hoisting_are_kept(place: Workplace, tmp_path: Path) -> None:
    place.export(tmp_path / "base", "--shards", "2", "--no-hoist", precision="fp32")
    place("lora", tmp_path / "base", "--add", place.lora("one"), "--out", tmp_path / "one")
    assert {"unet_shard_0", "unet_shard_1"} <= set(open_bundle(tmp_path / "one").manifest.components)
    place("lora", tmp_path / "one", "--remove", place.lora("one"), "--out", tmp_path / "back")
    assert unlike(tmp_path / "base", tmp_path / "back") == set()


def test_a_plan_of_precisions_is_kept(place: Workplace, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    text = (place.folder / "base/precision/unet.toml").read_text()
    plan.write_text(text.replace('"int8"', '"w8"', 1))
    assert plan.read_text() != text
    place.export(tmp_path / "base", precision=plan)
    place("lora", tmp_path / "base", "--add", place.lora("one"), "--out", tmp_path / "one")
    ours, theirs = ((tmp_path / name / "precision/unet.toml").read_text().splitlines() for name in ("one", "base"))
    assert [line for line in ours if line not in theirs] == [line for line in ours if line.startswith("graph = ")]
    place("lora", tmp_path / "one", "--clear", "--out", tmp_path / "back")
    assert unlike(tmp_path / "base", tmp_path / "back") == set()


@pytest.fixture(scope="module")
def with_one(place: Workplace) -> Path:
    """A float32 bundle with a LoRA whose file is a copy of its own."""
    shutil.copy(place.lora("one"), place.lora("copy"))
    place.export(place.folder / "with-one", "--lora", place.lora("copy"), precision="fp32")
    return place.folder / "with-one"


def test_a_lora_comes_once(place: Workplace, with_one: Path, tmp_path: Path) -> None:
    said = place.refusal(with_one, "--add", f"{place.lora('one')}:0.5", "--out", tmp_path / "out")
    assert (
        f"the LoRA {place.lora('one')} is there already, as {place.lora('copy')}; for another scale, --remove" in said
    )
    twice = ("--add", place.lora("two"), "--add", f"{place.lora('two')}:2")
    assert "is there already" in place.refusal(with_one, *twice, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing is to be changed; give --add"),
        (("--add", "style.safetensors:strong"), "'style.safetensors:strong' is not FILE[:SCALE]"),
        (("--add", "style.safetensors:nan"), "'style.safetensors:nan' is not FILE[:SCALE]"),
        (("--add", "nowhere.safetensors"), "LoRA nowhere.safetensors not found"),
        (("--remove", "other"), "the bundle has no LoRA other; it has /"),
        (("--clear", "--remove", "copy.safetensors"), "--clear removes all LoRAs already; leave out --remove"),
    ],
)
def test_changes_that_make_no_sense_are_refused(
    place: Workplace, with_one: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in place.refusal(with_one, *options, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_clearing_nothing_is_refused(place: Workplace, tmp_path: Path) -> None:
    assert "has no LoRA that --clear could" in place.refusal(
        place.folder / "base", "--clear", "--out", tmp_path / "out"
    )


def test_places_that_are_taken_are_refused(place: Workplace, with_one: Path, tmp_path: Path) -> None:
    before = contents(with_one)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").write_text("three years")
    assert f"{tmp_path / 'taken'} exists" in place.refusal(with_one, "--clear", "--out", tmp_path / "taken")
    assert f"{place.folder / 'base'} exists" in place.refusal(with_one, "--clear", "--out", place.folder / "base")
    assert "is inside the bundle" in place.refusal(with_one, "--clear", "--out", with_one / "new")
    assert "is inside the bundle" in place.refusal(with_one, "--clear", "--out", with_one)
    assert contents(with_one) == before
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_lora_for_another_architecture_is_refused_by_its_first_layer(
    place: Workplace, with_one: Path, tmp_path: Path
) -> None:
    said = place.refusal(with_one, "--add", "tiny-lcm", "--out", tmp_path / "out")
    assert "does not fit the checkpoint: " in said
    assert "unet." in said
    assert list(tmp_path.iterdir()) == []


def test_what_the_bundle_was_made_from_has_to_be_there_as_it_was(place: Workplace, tmp_path: Path) -> None:
    model = Path(shutil.copytree(place.model, tmp_path / "model"))
    lora = Path(shutil.copy(place.lora("one"), tmp_path / "mine.safetensors"))
    own = Workplace(place.folder, model)
    own.export(tmp_path / "bundle", "--lora", lora, precision="fp32")
    change = (tmp_path / "bundle", "--add", place.lora("two"), "--out", tmp_path / "out")

    write_lora(lora, place.model, ("to_q",), seed=9)
    assert f"the LoRA {lora} has changed since the bundle was made; bring it back, or --remove" in own.refusal(*change)
    lora.unlink()
    assert f"the LoRA {lora} is gone, which the bundle was made with" in own.refusal(*change)
    own("lora", tmp_path / "bundle", "--remove", "mine.safetensors", "--out", tmp_path / "without")

    shutil.copy(place.lora("one"), lora)
    other = save_minimal_pipeline(tmp_path, seed=3, guidance_width=None)
    shutil.copytree(other, model, dirs_exist_ok=True)
    assert f"{model} is another checkpoint now than the one that the bundle was made from" in own.refusal(*change)
    shutil.rmtree(model)
    assert f"{model} is gone, which {tmp_path / 'bundle'} was made from" in own.refusal(*change)
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_does_not_say_what_it_was_made_from_is_refused(
    place: Workplace, with_one: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(with_one, tmp_path / "old"))
    (old / "request.json").unlink()
    manifest = json.loads((old / "sdc.json").read_text())
    del manifest["files"]["request.json"]
    (old / "sdc.json").write_text(json.dumps(manifest))
    assert "does not say what it was made from" in place.refusal(old, "--clear", "--out", tmp_path / "out")


def test_an_export_with_an_lcm_lora_names_its_sampler(place: Workplace, tmp_path: Path) -> None:
    shutil.copy(place.lora("one"), tmp_path / "my-LCM.safetensors")
    said = place.export(tmp_path / "few", "--lora", tmp_path / "my-LCM.safetensors", precision="fp32")
    assert said.endswith('--prompt "..." --sampler lcm --steps 4 --guidance 1\n')
    said = place("lora", tmp_path / "few", "--clear", "--out", tmp_path / "many")
    assert said.endswith('--prompt "..."\n')
