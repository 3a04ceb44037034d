"""A distillation of a small model in this process: what it trains, what it writes, what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from queue import Queue
from threading import Thread

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from minimal_pipeline import LATENT_CHANNELS, TEXT_WIDTH, save_minimal_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdc.compiler.distill.adapters import LoraRoles
from sdc.compiler.distill.distill import Distilled, distill_lora
from sdc.compiler.distill.pictures import FolderPictures
from sdc.compiler.distill.settings import DistillSettings, learning_rate_at, settings_for
from sdc.compiler.distill.training_loop import Reporting
from sdc.compiler.load import LoraSource, load_checkpoint
from sdc.compiler.workshop.staging import exclusive
from sdc.engines.errors import InputError

SETTINGS = DistillSettings(
    rank=3, steps=60, batch=6, learning_rate=0.01, guidance=(1.5, 2.5), average_decay=0.9, huber_width=0.01
)


def distill(model: Path, pictures: Path, work: Path, settings: DistillSettings = SETTINGS) -> Distilled:
    return distill_lora(
        load_checkpoint(str(model)),
        FolderPictures(pictures, size_px=(40, 40)),
        settings,
        out=work.with_suffix(".safetensors"),
        reporting=Reporting(work, ["one prompt", "another"], checkpoint_every=25, grid_every=40),
    )


@pytest.fixture(scope="module")
def work(model: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended; beside it, the LoRA."""
    folder = tmp_path_factory.mktemp("distilled") / "work"
    distill(model, picture_folder, folder)
    return folder


def losses_of(work: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (work / "losses.jsonl").read_text().splitlines()]


@torch.no_grad()
def run_unet(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(3, LATENT_CHANNELS, 10, 14, generator=generator)
    states = torch.randn(3, 7, TEXT_WIDTH, generator=generator)
    output: Tensor = unet(sample, torch.tensor([9, 501, 999]), states).sample
    return output


def test_the_loss_falls(work: Path, model: Path, picture_folder: Path, tmp_path: Path) -> None:
    """Against a run of the same batches that learns nothing: timesteps make losses too unlike to compare in one run."""
    distill(model, picture_folder, tmp_path / "still", dataclasses.replace(SETTINGS, learning_rate=1e-12))
    learning, still = losses_of(work), losses_of(tmp_path / "still")
    assert learning[0] == still[0]
    assert sum(learning[-15:]) < 0.8 * sum(still[-15:])


def test_every_line_of_the_log_has_its_step(work: Path) -> None:
    lines = [json.loads(line) for line in (work / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, SETTINGS.steps + 1))
    assert lines[7]["learning_rate"] == SETTINGS.learning_rate / 4
    assert all(line["gradient_norm"] > 0 for line in lines)


def test_grids_have_a_row_for_every_prompt(work: Path) -> None:
    assert [path.name for path in sorted(work.glob("*.png"))] == ["grid-000040.png", "grid-000060.png"]
    with Image.open(work / "grid-000060.png") as grid:
        pixels = torch.frombuffer(bytearray(grid.convert("RGB").tobytes()), dtype=torch.uint8)
        assert grid.size[1] == 2 * (80 + 4)
    assert len(pixels.unique()) > 20


def test_the_result_is_the_average(work: Path) -> None:
    saved = torch.load(work / "checkpoint.pt", weights_only=True)["weights"]
    written = load_file(work.with_suffix(".safetensors"))
    assert len(written) == len(saved["target"]) > 50
    assert any(not torch.equal(saved["target"][name], saved["student"][name]) for name in saved["target"])
    for name, tensor in saved["target"].items():
        assert torch.equal(written[f"unet.{name}"], tensor.half()), name


def test_the_file_is_folded_as_diffusers_loads_it(work: Path, model: Path) -> None:
    file = work.with_suffix(".safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    plain = run_unet(pipeline.unet)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    loaded = run_unet(pipeline.unet)
    folded = run_unet(load_checkpoint(str(model), loras=[LoraSource(file)]).unet())
    assert (loaded - plain).abs().max() > 0.01
    torch.testing.assert_close(folded, loaded, atol=1e-5, rtol=1e-5)


def test_the_share_counts_the_layers_that_lcm_lora_changes(
    work: Path, model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    unet = load_checkpoint(str(model)).unet()
    ends = (
        *(".to_q", ".to_k", ".to_v", ".to_out.0", ".proj_in", ".proj_out", ".ff.net.0.proj", ".ff.net.2"),
        *(".conv1", ".conv2", ".conv_shortcut", ".downsamplers.0.conv", ".upsamplers.0.conv", ".time_emb_proj"),
    )
    weights = [part.weight for name, part in unet.named_modules() if name.endswith(ends)]
    trained = SETTINGS.rank * sum(weight.shape[0] + weight[0].numel() for weight in weights)
    done = distill(model, picture_folder, work)  # ended already: nothing is trained
    assert done.trained_share == pytest.approx(trained / sum(each.numel() for each in unet.parameters()), rel=1e-12)
    assert sum(tensor.numel() for tensor in load_file(done.out).values()) == trained


def test_gradient_checkpointing_changes_no_loss(work: Path, model: Path, picture_folder: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, steps=3, gradient_checkpointing=True)
    distill(model, picture_folder, tmp_path / "with", settings)
    distill(model, picture_folder, tmp_path / "without", dataclasses.replace(settings, gradient_checkpointing=False))
    assert losses_of(tmp_path / "with") == pytest.approx(losses_of(tmp_path / "without"), rel=1e-5)


def test_a_checkpoint_of_other_settings_is_refused_with_what_differs(
    work: Path, model: Path, picture_folder: Path
) -> None:
    before = (work / "checkpoint.pt").read_bytes()
    settings = dataclasses.replace(SETTINGS, rank=4, guidance=(1.5, 9.0))
    expected = r"rank is 3 there and 4 here; guidance is \[1.5, 2.5\] there and \[1.5, 9.0\] here; name another folder"
    with pytest.raises(InputError, match=expected):
        distill(model, picture_folder, work, settings)
    assert (work / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(work: Path, picture_folder: Path, tmp_path: Path) -> None:
    other = save_minimal_pipeline(tmp_path, seed=18, guidance_width=None)
    with pytest.raises(InputError, match=r"another run: unet is '.*' there and '.*' here"):
        distill(other, picture_folder, work)


def test_two_runs_in_one_folder_take_turns(work: Path, model: Path, picture_folder: Path) -> None:
    told = Queue[str]()
    reporting = Reporting(work, ["a prompt"], tell=told.put)
    pictures, out = FolderPictures(picture_folder, size_px=(40, 40)), work.with_suffix(".safetensors")
    second = Thread(
        target=distill_lora,
        args=(load_checkpoint(str(model)), pictures, SETTINGS),
        kwargs={"out": out, "reporting": reporting},
    )
    before = out.stat().st_mtime_ns
    with exclusive(work):
        second.start()
        assert told.get(timeout=60).startswith("waiting for another process")
        assert out.stat().st_mtime_ns == before
    second.join()
    assert out.stat().st_mtime_ns != before


def test_a_damaged_checkpoint_is_refused(model: Path, picture_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "checkpoint.pt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(InputError, match=r"checkpoint.pt cannot be read"):
        distill(model, picture_folder, tmp_path / "work")


def test_a_model_that_is_distilled_already_is_refused(
    minimal_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is a latent consistency model already"):
        distill(minimal_folder, picture_folder, tmp_path / "work")


def test_the_lora_of_another_architecture_is_refused_by_its_first_layer(work: Path) -> None:
    names = sorted(load_file(work.with_suffix(".safetensors")))
    with pytest.raises(InputError) as caught:
        load_checkpoint("tiny", loras=[LoraSource(work.with_suffix(".safetensors"))])
    first = names[0].removesuffix(".lora_A.weight")
    assert f"{first} changes a weight of [" in str(caught.value)
    assert "another architecture" in str(caught.value)


def test_one_layer_of_another_shape_is_refused(work: Path, model: Path, tmp_path: Path) -> None:
    tensors = load_file(work.with_suffix(".safetensors"))
    name = "unet.up_blocks.1.resnets.1.conv2"
    tensors[f"{name}.lora_A.weight"] = torch.zeros(3, 13, 3, 3)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=rf"{name} changes a weight of \[12, 117\], .*\[12, 12, 3, 3\]"):
        load_checkpoint(str(model), loras=[LoraSource(tmp_path / "bad.safetensors")])


def test_one_unet_plays_three_roles(model: Path) -> None:
    unet = load_checkpoint(str(model)).unet()
    plain = copy.deepcopy(unet)
    lora = LoraRoles(unet, rank=2, seed=3)
    roles = lora.roles()
    generator = torch.Generator().manual_seed(8)
    sample = torch.randn(2, LATENT_CHANNELS, 10, 10, generator=generator)
    inputs = (sample, torch.tensor([19, 999]), torch.randn(2, 7, TEXT_WIDTH, generator=generator))
    with torch.no_grad():
        expected = plain(*inputs).sample
        assert all(torch.equal(role(*inputs), expected) for role in (roles.teacher, roles.target, roles.student))
        for parameter in lora.student.values():
            parameter.add_(0.1)
        changed = roles.student(*inputs)
        assert (changed - expected).abs().max() > 0.01
        assert torch.equal(roles.target(*inputs), expected)
        assert torch.equal(roles.teacher(*inputs), expected)
        before = {name: tensor.clone() for name, tensor in lora.target.items()}
        lora.average(0.75)
        for name, tensor in lora.target.items():
            torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * lora.student[name])
    roles.student(*inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in lora.student.values())
    others = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    assert all(".student." in name for name in others)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    found = [learning_rate_at(step, steps=1000, largest=3.0) for step in (1, 8, 32, 500, 751, 1000)]
    assert found == pytest.approx([3 / 32, 0.75, 3.0, 3.0, 1.5, 0.0], abs=1e-4)


def test_tiny_has_a_recipe_of_its_own() -> None:
    assert settings_for("tiny") != settings_for("sd15") == DistillSettings()
    assert settings_for("tiny").guidance[1] < settings_for("sd15").guidance[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be 1 or more, found 0"),
        ({"steps": -1}, "steps must be 1 or more, found -1"),
        ({"seed": -1}, "seed must be in 0 to"),
        ({"learning_rate": 0.0}, "learning rate must be above 0"),
        ({"guidance": (3.0, 2.0)}, "guidance 3:2 is no range"),
        ({"guidance": (0.5, 2.0)}, "guidance 0.5:2 is no range"),
        ({"average_decay": 1.0}, "decay must be in 0 to 1"),
        ({"precision": "fp16"}, "unknown precision 'fp16'; choose from fp32, bf16"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SETTINGS, **change)  # type: ignore[arg-type]
