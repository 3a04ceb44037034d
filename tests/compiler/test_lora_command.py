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
from sdc.compiler.lora import LoraChange, request_with_loras
from sdc.engines.bundle import open_bundle
from sdc.engines.errors import InputError

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


@pytest.fixture(scope="module")
def one(place: Workplace) -> tuple[Path, str]:
    """The bundle with a LoRA added, and what was said."""
    out = place.folder / "one"
    return out, place("lora", place.folder / "base", "--add", f"{place.lora('one')}:0.7", "--out", out)


@pytest.fixture(scope="module")
def few_steps(place: Workplace) -> tuple[Path, str]:
    """A float32 bundle with a LoRA whose file is a copy of its own, and what the export said."""
    shutil.copy(place.lora("one"), place.lora("copy-LCM"))
    out = place.folder / "few-steps"
    return out, place.export(out, "--lora", place.lora("copy-LCM"), precision="fp32")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unlike(left: Path, right: Path) -> set[str]:
    """Files that two bundles do not share, or that differ."""
    ours, theirs = contents(left), contents(right)
    return {name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)}


def made_anew(said: str) -> set[str]:
    """Stages that a worker process ran, not the cache."""
    return {line.split("  ")[0] for line in said.splitlines() if line.endswith(" GB")}


def refuse(bundle: Path, out: Path, message: str, *add: str | Path, remove: tuple[str, ...] = (), clear: bool = False):
    change = LoraChange(tuple(map(str, add)), remove, clear)
    with pytest.raises(InputError) as caught:
        request_with_loras(bundle, change, out)
    assert message in str(caught.value)


def test_adding_and_removing_gives_the_first_bundle(place: Workplace, one: tuple[Path, str], tmp_path: Path) -> None:
    base, both, again, none = place.folder / "base", *(tmp_path / name for name in ("both", "again", "none"))
    before = contents(base)
    place("lora", one[0], "--add", place.lora("two"), "--out", both)
    place("lora", both, "--remove", "two.safetensors", "--out", again)
    said = place("lora", both, "--clear", "--out", none)
    assert unlike(again, one[0]) == set()
    assert unlike(none, base) == set()
    assert contents(base) == before
    assert [(each.file, each.scale) for each in open_bundle(both).manifest.model.loras] == [
        ("one.safetensors", 0.7),
        ("two.safetensors", 1.0),
    ]
    weights = {(bundle / "unet/model.onnx_data").read_bytes() for bundle in (base, one[0], both)}
    assert len(weights) == 3
    assert said.endswith('--prompt "..."\n')


def test_it_is_what_an_export_with_the_same_calibration_makes(
    place: Workplace, one: tuple[Path, str], tmp_path: Path
) -> None:
    """The export traces the module, with a cache of its own; `sdc lora` patched the graph."""
    lora = f"{place.lora('one')}:0.7"
    fresh = Workplace(tmp_path, place.model)
    fresh.export(tmp_path / "bundle", "--lora", lora, "--calibration-table", one[0] / "calibration/unet.json")
    assert unlike(one[0], tmp_path / "bundle") == set()


def test_only_what_the_lora_changes_is_made_again(place: Workplace, one: tuple[Path, str], tmp_path: Path) -> None:
    unet = {"load", "export unet", "calibrate unet", "check fp16", "build unet for ort-cpu"}
    assert made_anew(one[1]) == unet
    said = place("lora", place.folder / "base", "--add", f"{place.lora('text')}:0.3", "--out", tmp_path / "text")
    assert "export unet" not in made_anew(said)
    changed = {name.split("/")[0] for name in unlike(place.folder / "base", tmp_path / "text")}
    assert changed - {"reports"} == {"text_encoder", "sdc.json", "request.json"}


def test_ranges_are_those_of_the_first_calibration(place: Workplace, one: tuple[Path, str]) -> None:
    before, after = (read_table(each / "calibration/unet.json") for each in (place.folder / "base", one[0]))
    assert after.ranges == before.ranges
    assert after.tensors == before.tensors
    assert after.graph_digest != before.graph_digest
    assert before.smoothing is not None
    assert after.smoothing is not None
    assert after.smoothing.factors == before.smoothing.factors


def there_and_back(place: Workplace, bundle: Path, folder: Path) -> Path:
    """Add a LoRA and take it away again, which has to give `bundle`; returns the bundle between."""
    place("lora", bundle, "--add", place.lora("one"), "--out", folder / "with")
    place("lora", folder / "with", "--remove", place.lora("one"), "--out", folder / "without")
    assert unlike(bundle, folder / "without") == set()
    return folder / "with"


def test_options_of_the_export_are_kept(place: Workplace, tmp_path: Path) -> None:
    calibration = ("--no-bias-correction", "--calibration", "max", "--smooth-quant", "0.5:1")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a bag\na red coat\n")
    place.export(tmp_path / "base", "--deepcache", "1", "--no-fuse", "--calibration-prompts", prompts, *calibration)
    prompts.unlink()
    changed = there_and_back(place, tmp_path / "base", tmp_path)
    again = request_with_loras(changed, LoraChange(clear=True), tmp_path / "again")
    assert again.prompts == ("a bag", "a red coat"), "float16 is checked with what it was checked with"
    table = read_table(tmp_path / "base/calibration/unet.json")
    assert table.smoothing is not None
    assert table.smoothing.factors, "nothing was smoothed, so that it shows nothing"


def test_a_plan_and_shards_without_hoisting_are_kept(place: Workplace, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    text = (place.folder / "base/precision/unet.toml").read_text()
    plan.write_text(text.replace('"int8"', '"w8"', 1))
    assert plan.read_text() != text
    place.export(tmp_path / "base", "--shards", "2", "--no-hoist", precision=plan)
    changed = there_and_back(place, tmp_path / "base", tmp_path)
    assert {"unet_shard_0", "unet_shard_1"} <= set(open_bundle(changed).manifest.components)
    ours, theirs = ((each / "precision/unet.toml").read_text().splitlines() for each in (changed, tmp_path / "base"))
    assert [line for line in ours if line not in theirs] == [line for line in ours if line.startswith("graph = ")]


def test_an_export_with_an_lcm_lora_names_its_sampler(few_steps: tuple[Path, str]) -> None:
    assert few_steps[1].endswith('--prompt "..." --sampler lcm --steps 4 --guidance 1\n')


def test_a_lora_comes_once(place: Workplace, few_steps: tuple[Path, str], tmp_path: Path) -> None:
    there = f"LoRA {place.lora('one')} is there already, as {place.lora('copy-LCM')}; for another scale, --remove"
    refuse(few_steps[0], tmp_path / "out", there, f"{place.lora('one')}:0.5")
    refuse(few_steps[0], tmp_path / "out", "is there already", place.lora("two"), f"{place.lora('two')}:2")


@pytest.mark.parametrize(
    ("add", "remove", "clear", "message"),
    [
        ((), (), False, "nothing is to be changed; give --add"),
        (("style.safetensors:strong",), (), False, "'style.safetensors:strong' is not FILE[:SCALE]"),
        (("style.safetensors:nan",), (), False, "'style.safetensors:nan' is not FILE[:SCALE]"),
        (("nowhere.safetensors",), (), False, "LoRA nowhere.safetensors not found"),
        ((), ("other",), False, "the bundle has no LoRA other; it has /"),
        ((), ("copy-LCM.safetensors",), True, "--clear removes all LoRAs already; leave out --remove"),
    ],
)
def test_changes_that_make_no_sense_are_refused(
    few_steps: tuple[Path, str],
    tmp_path: Path,
    add: tuple[str, ...],
    remove: tuple[str, ...],
    clear: bool,
    message: str,
) -> None:
    refuse(few_steps[0], tmp_path / "out", message, *add, remove=remove, clear=clear)


def test_clearing_nothing_is_refused(place: Workplace, tmp_path: Path) -> None:
    refuse(place.folder / "base", tmp_path, "the bundle has no LoRA that --clear could remove", clear=True)


def test_places_that_are_taken_are_refused(place: Workplace, few_steps: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    for taken in (tmp_path, tmp_path / "thesis.txt", place.folder / "base"):
        refuse(few_steps[0], taken, f"{taken} exists; choose another --out", clear=True)
    for inside in (few_steps[0], few_steps[0] / "new"):
        refuse(few_steps[0], inside, f"{inside} is inside the bundle", clear=True)


def test_a_lora_for_another_architecture_is_refused_by_its_first_layer(
    place: Workplace, few_steps: tuple[Path, str], tmp_path: Path
) -> None:
    done = place.start("lora", few_steps[0], "--add", "tiny-lcm", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "tiny-lcm-lora.safetensors does not fit the checkpoint: " in done.stderr
    assert "unet.down_blocks.0." in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_the_bundle_was_made_from_has_to_be_there_as_it_was(place: Workplace, tmp_path: Path) -> None:
    model = Path(shutil.copytree(place.model, tmp_path / "model"))
    lora = Path(shutil.copy(place.lora("one"), tmp_path / "mine.safetensors"))
    bundle, out, two = tmp_path / "bundle", tmp_path / "out", place.lora("two")
    own = Workplace(place.folder, model)
    own.export(bundle, "--lora", lora, precision="fp32")

    write_lora(lora, place.model, ("to_q",), seed=9)
    refuse(bundle, out, f"the LoRA {lora} has changed since the bundle was made; bring it back, or --remove", two)
    lora.unlink()
    refuse(bundle, out, f"the LoRA {lora} is gone, which the bundle was made with", two)
    own("lora", bundle, "--remove", "mine.safetensors", "--out", tmp_path / "without")

    other = save_minimal_pipeline(tmp_path, seed=3, guidance_width=None)
    shutil.copytree(other, model, dirs_exist_ok=True)
    done = own.start("lora", tmp_path / "without", "--add", two, "--out", out)
    assert done.returncode == 2
    assert f"{model} is another checkpoint now than the one that the bundle was made from" in done.stderr
    shutil.rmtree(model)
    refuse(tmp_path / "without", out, f"{model} is gone, which {tmp_path / 'without'} was made from", two)
    assert not out.exists()


def test_a_bundle_that_does_not_say_what_it_was_made_from_is_refused(
    few_steps: tuple[Path, str], tmp_path: Path
) -> None:
    old = Path(shutil.copytree(few_steps[0], tmp_path / "old"))
    (old / "request.json").unlink()
    manifest = json.loads((old / "sdc.json").read_text())
    del manifest["files"]["request.json"]
    (old / "sdc.json").write_text(json.dumps(manifest))
    refuse(old, tmp_path / "out", "does not say what it was made from: it has no request.json", clear=True)
