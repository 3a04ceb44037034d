"""A checkpoint in one file of the original layout equals the pipeline it was written from, without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from original_layout import original_clip, original_open_clip, original_unet, original_vae
from safetensors.torch import save_file
from small_pipelines import make_pipeline, run_text_encoder, run_unet, run_vae
from torch import Tensor, nn

from sdc.compiler.load import Checkpoint, load_checkpoint
from sdc.compiler.load.folder import read_json, shipped_configs
from sdc.compiler.load.networks import NETWORKS, make_empty
from sdc.engines.errors import InputError


def original_tensors(pipeline: StableDiffusionPipeline, *, open_clip: bool = False) -> dict[str, Tensor]:
    """All that a training run leaves in its file: the networks, the schedule, a part of the averaged weights."""
    text = original_open_clip if open_clip else original_clip
    tensors = {**original_unet(pipeline.unet), **original_vae(pipeline.vae), **text(pipeline.text_encoder)}
    extras = {
        "betas": torch.linspace(0.1, 0.2, 5),
        "model_ema.decay": torch.tensor(0.9999),
        "first_stage_model.loss.logvar": torch.zeros(1),
    }
    return {**tensors, **extras}


def assert_same_weights(checkpoint: Checkpoint, pipeline: StableDiffusionPipeline) -> None:
    for found, source in (
        (checkpoint.unet(), pipeline.unet),
        (checkpoint.vae(), pipeline.vae),
        (checkpoint.text_encoder(), pipeline.text_encoder),
    ):
        weights = found.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in source.state_dict().items())


@pytest.fixture(scope="module")
def configs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small pipeline's configurations without its weights."""
    path = tmp_path_factory.mktemp("configs") / "small"
    return Path(shutil.copytree(folder, path, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture
def file(pipeline: StableDiffusionPipeline, tmp_path: Path) -> Path:
    save_file(original_tensors(pipeline), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def test_networks_equal_the_source(pipeline: StableDiffusionPipeline, file: Path, configs: Path) -> None:
    checkpoint = load_checkpoint(str(file), configs=configs)
    assert checkpoint.name == "small"
    assert_same_weights(checkpoint, pipeline)
    torch.testing.assert_close(run_unet(checkpoint.unet()), run_unet(pipeline.unet))
    torch.testing.assert_close(run_vae(checkpoint.vae()), run_vae(pipeline.vae))
    torch.testing.assert_close(run_text_encoder(checkpoint.text_encoder()), run_text_encoder(pipeline.text_encoder))


def test_open_clip_and_linear_projections_equal_the_source(tmp_path: Path) -> None:
    pipeline = make_pipeline(tmp_path / "tokenizer", seed=21, linear_projection=True, text_width=30)
    pipeline.save_pretrained(tmp_path / "configs")
    save_file(original_tensors(pipeline, open_clip=True), tmp_path / "two.safetensors")
    checkpoint = load_checkpoint(str(tmp_path / "two.safetensors"), configs=tmp_path / "configs")
    assert_same_weights(checkpoint, pipeline)
    torch.testing.assert_close(run_text_encoder(checkpoint.text_encoder()), run_text_encoder(pipeline.text_encoder))


def test_older_text_encoder_without_the_prefix(pipeline: StableDiffusionPipeline, file: Path, configs: Path) -> None:
    tensors = {name.replace(".text_model.", "."): value for name, value in original_tensors(pipeline).items()}
    save_file(tensors, file)
    checkpoint = load_checkpoint(str(file), configs=configs)
    assert_same_weights(checkpoint, pipeline)


def test_tokenizer_is_clips_own_where_none_is_given(file: Path, configs: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(configs, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer")))
    given, own = (
        load_checkpoint(str(file), configs=path).tokenizer_files["tokenizer.json"] for path in (configs, bare)
    )
    assert json.loads(own) == json.loads(given)


def test_digest_is_that_of_the_content(pipeline: StableDiffusionPipeline, file: Path, configs: Path) -> None:
    first = load_checkpoint(str(file), configs=configs).digest("unet")
    file.rename(file.with_name("renamed.safetensors"))
    assert load_checkpoint(str(file.with_name("renamed.safetensors")), configs=configs).digest("unet") == first


def test_random_weights_take_the_architecture(file: Path, configs: Path) -> None:
    checkpoint = load_checkpoint(str(file), configs=configs, weights="random", seed=2)
    assert checkpoint.weights == "random"
    assert checkpoint.unet().conv_in.out_channels == 12


def test_other_widths_without_configurations_name_the_way_out(file: Path) -> None:
    with pytest.raises(InputError, match=r"is \[49408, 24\], expected \[49408, 768\].*--config"):
        load_checkpoint(str(file))


def test_configurations_are_for_single_files_only(folder: Path, configs: Path) -> None:
    with pytest.raises(InputError, match="brings its own configurations"):
        load_checkpoint(str(folder), configs=configs)


def test_a_part_that_the_converter_does_not_know_is_named(
    pipeline: StableDiffusionPipeline, file: Path, configs: Path
) -> None:
    name = "model.diffusion_model.time_embed.cond_proj.weight"
    save_file({**original_tensors(pipeline), name: torch.zeros(48, 5)}, file)
    with pytest.raises(InputError, match=rf"1 tensor unexpected, first {name}"):
        load_checkpoint(str(file), configs=configs)


@pytest.mark.parametrize("network", ["vae", "text_encoder", "unet"])
def test_a_missing_network_is_named(pipeline: StableDiffusionPipeline, file: Path, configs: Path, network: str) -> None:
    prefix = {"vae": "first_stage_model", "text_encoder": "cond_stage_model", "unet": "model.diffusion_model"}[network]
    tensors = {name: value for name, value in original_tensors(pipeline).items() if not name.startswith(prefix)}
    save_file(tensors, file)
    with pytest.raises(InputError, match=rf"no tensor begins with {prefix}"):
        load_checkpoint(str(file), configs=configs)


def test_a_missing_tensor_is_named(pipeline: StableDiffusionPipeline, file: Path, configs: Path) -> None:
    tensors = original_tensors(pipeline)
    del tensors["model.diffusion_model.middle_block.2.out_layers.3.bias"]
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"1 tensor missing, first mid_block\.resnets\.1\.conv2\.bias"):
        load_checkpoint(str(file), configs=configs)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", (7,), "xl_base"),
        ("model.diffusion_model.input_blocks.0.0.weight", (12, 9, 3, 3), "inpainting"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", (7,), "flux"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, name: str, shape: tuple[int, ...], kind: str) -> None:
    save_file({name: torch.zeros(shape)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=f"of kind {kind}"):
        load_checkpoint(str(tmp_path / "other.safetensors"))


def test_a_lora_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    save_file({"lora_unet_conv_in.lora_down.weight": torch.zeros(2, 3)}, tmp_path / "style.safetensors")
    with pytest.raises(InputError, match="it is a LoRA: give it with --lora"):
        load_checkpoint(str(tmp_path / "style.safetensors"))


def test_damaged_files_are_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    for damaged in (content[:-7], content[:100], b"", b"\xff" * 64):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"small\.safetensors \({len(damaged)} bytes\) is not a whole"):
            load_checkpoint(str(file))


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "model.bin"])
def test_pickles_are_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"is a pickle.*convert it to safetensors"):
        load_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize("model", ["nonsense", "./no/such/folder", "none.safetensors", ""])
def test_unknown_models_are_refused(model: str) -> None:
    with pytest.raises(InputError, match=r"unknown model|not found"):
        load_checkpoint(model)


def write_sparse(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of float16 zeros that takes no room on the disk, for tensors without storage."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def empty_networks(architecture: str, *, text_layers: int) -> dict[str, nn.Module]:
    configs = {name: read_json(shipped_configs(architecture) / name / "config.json") for name in NETWORKS}
    configs["text_encoder"]["num_hidden_layers"] = text_layers
    return {name: make_empty(name, config, origin=architecture) for name, config in configs.items()}


def test_stable_diffusion_1_needs_no_configurations(tmp_path: Path) -> None:
    networks = empty_networks("sd15", text_layers=12)
    unet, vae = original_unet(networks["unet"]), original_vae(networks["vae"])
    write_sparse(tmp_path / "one.safetensors", {**unet, **vae, **original_clip(networks["text_encoder"])})
    checkpoint = load_checkpoint(str(tmp_path / "one.safetensors"))
    assert checkpoint.config("unet")["cross_attention_dim"] == 768
    assert checkpoint.scheduler_config["prediction_type"] == "epsilon"
    assert sum(tensor.numel() for tensor in checkpoint.text_encoder().state_dict().values()) == 123_060_480


def test_stable_diffusion_2_needs_no_configurations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    networks = empty_networks("sd2", text_layers=24)  # the last layer of the file is not used
    unet, vae = original_unet(networks["unet"]), original_vae(networks["vae"])
    write_sparse(tmp_path / "two.safetensors", {**unet, **vae, **original_open_clip(networks["text_encoder"])})
    checkpoint = load_checkpoint(str(tmp_path / "two.safetensors"))
    assert checkpoint.config("text_encoder")["num_hidden_layers"] == 23
    assert checkpoint.scheduler_config["prediction_type"] == "v_prediction"
    assert "taken to predict v" in caplog.text
