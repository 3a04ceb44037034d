"""Folders in diffusers' layout are loaded whole, with the weights that diffusers itself loads, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from small_pipelines import run_text_encoder, run_unet, run_vae

from sdc.compiler.load import load_checkpoint
from sdc.engines.errors import InputError

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_networks_equal_the_pipeline_that_was_saved(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    checkpoint = load_checkpoint(str(folder))
    for found, source in (
        (checkpoint.unet(), pipeline.unet),
        (checkpoint.vae(), pipeline.vae),
        (checkpoint.text_encoder(), pipeline.text_encoder),
    ):
        assert not found.training
        weights = found.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in source.state_dict().items())
        assert {value.dtype for value in weights.values()} == {torch.float32}
    assert torch.equal(run_unet(checkpoint.unet()), run_unet(pipeline.unet))
    assert torch.equal(run_text_encoder(checkpoint.text_encoder()), run_text_encoder(pipeline.text_encoder))
    assert torch.equal(run_vae(checkpoint.vae()), run_vae(pipeline.vae))


def test_metadata_is_that_of_the_pipeline(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint.name == folder.name
    assert checkpoint.scheduler_config["beta_end"] == 0.012
    assert checkpoint.model_index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert checkpoint.model_index["safety_checker"] == [None, None]
    assert checkpoint.config("vae_decoder")["block_out_channels"] == [6, 12, 18, 24]
    tokenizer = json.loads(checkpoint.tokenizer_files["tokenizer.json"])
    assert tokenizer["model"]["vocab"] == pipeline.tokenizer.get_vocab()


def test_half_precision_variant_and_shards_are_read(own: Path, pipeline: StableDiffusionPipeline) -> None:
    shutil.rmtree(own / "unet")
    pipeline.unet.save_pretrained(own / "unet", max_shard_size="200KB")
    assert len(list((own / "unet").glob("*.safetensors"))) > 1
    half = {name: tensor.half() for name, tensor in load_file(own / "vae/diffusion_pytorch_model.safetensors").items()}
    (own / "vae/diffusion_pytorch_model.safetensors").unlink()
    save_file(half, own / "vae/diffusion_pytorch_model.fp16.safetensors")
    checkpoint = load_checkpoint(str(own))
    assert torch.equal(run_unet(checkpoint.unet()), run_unet(pipeline.unet))
    weights = checkpoint.vae().state_dict()
    assert all(torch.equal(weights[name], value.float()) for name, value in half.items())


def test_names_of_older_files_are_understood(own: Path, pipeline: StableDiffusionPipeline) -> None:
    text_file = own / "text_encoder/model.safetensors"
    text = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(text_file).items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, text_file)
    vae_file = own / "vae/diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    vae = {}
    for name, value in load_file(vae_file).items():
        new_name = name
        for now, then in old.items():
            new_name = new_name.replace(now, then)
        is_projection = new_name != name and value.ndim == 2
        vae[new_name] = value[:, :, None, None].contiguous() if is_projection else value
    assert any("query" in name for name in vae)
    save_file(vae, vae_file)
    checkpoint = load_checkpoint(str(own))
    assert torch.equal(run_text_encoder(checkpoint.text_encoder()), run_text_encoder(pipeline.text_encoder))
    assert torch.equal(run_vae(checkpoint.vae()), run_vae(pipeline.vae))


def test_digests_follow_the_contents_and_nothing_else(own: Path, folder: Path) -> None:
    first, copy = load_checkpoint(str(folder)), load_checkpoint(str(own))
    components = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    assert [first.digest(name) for name in components] == [copy.digest(name) for name in components]
    weights = load_file(own / UNET_FILE)
    weights["conv_in.bias"][0] += 1
    save_file(weights, own / UNET_FILE)
    edit_json(own / "vae/config.json", scaling_factor=0.5)
    edit_json(own / "text_encoder/config.json", transformers_version="9.9")
    changed = load_checkpoint(str(own))
    assert changed.digest("unet") != first.digest("unet")
    assert changed.digest("vae_decoder") != first.digest("vae_decoder")
    assert changed.digest("text_encoder") == first.digest("text_encoder")


def test_truncated_weights_are_refused(own: Path) -> None:
    content = (own / UNET_FILE).read_bytes()
    (own / UNET_FILE).write_bytes(content[: len(content) - 1001])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_checkpoint(str(own))


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model.safetensors", "unet/config.json", "model_index.json"])
def test_a_missing_file_is_named(own: Path, part: str) -> None:
    (own / part).unlink()
    with pytest.raises(InputError, match=Path(part).name.replace(".", r"\.")):
        load_checkpoint(str(own))


def test_a_missing_tokenizer_is_named(own: Path) -> None:
    (own / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor vocab\.json"):
        load_checkpoint(str(own))


def test_the_first_shape_that_differs_is_named(own: Path) -> None:
    weights = load_file(own / UNET_FILE)
    weights["mid_block.resnets.1.conv2.weight"] = torch.zeros(48, 47, 3, 3)
    save_file(weights, own / UNET_FILE)
    expected = r"mid_block\.resnets\.1\.conv2\.weight is \[48, 47, 3, 3\], expected \[48, 48, 3, 3\]"
    with pytest.raises(InputError, match=expected):
        load_checkpoint(str(own))


def test_missing_and_additional_weights_are_named(own: Path) -> None:
    weights = load_file(own / UNET_FILE)
    del weights["conv_out.bias"]
    save_file(weights, own / UNET_FILE)
    with pytest.raises(InputError, match=r"1 tensor missing, first conv_out\.bias"):
        load_checkpoint(str(own))
    save_file({**weights, "conv_out.bias": torch.zeros(4), "conv_out.gain": torch.zeros(4)}, own / UNET_FILE)
    with pytest.raises(InputError, match=r"1 tensor unexpected, first conv_out\.gain"):
        load_checkpoint(str(own))


def test_weights_that_are_not_finite_are_named(own: Path) -> None:
    weights = load_file(own / UNET_FILE)
    weights["conv_in.bias"][2] = float("nan")
    save_file(weights, own / UNET_FILE)
    checkpoint = load_checkpoint(str(own))
    with pytest.raises(InputError, match=r"conv_in\.bias holds NaN"):
        checkpoint.unet()


@pytest.mark.parametrize(
    "pipeline_class", ["StableDiffusionXLPipeline", "FluxPipeline", "StableDiffusionInpaintPipeline"]
)
def test_other_pipelines_are_refused_by_name(own: Path, pipeline_class: str) -> None:
    edit_json(own / "model_index.json", _class_name=pipeline_class)
    with pytest.raises(InputError, match=pipeline_class):
        load_checkpoint(str(own))


def test_other_networks_are_refused_by_name(own: Path) -> None:
    edit_json(own / "vae/config.json", _class_name="AutoencoderTiny")
    with pytest.raises(InputError, match="AutoencoderTiny"):
        load_checkpoint(str(own))


def test_a_unet_with_added_conditions_is_refused(own: Path) -> None:
    edit_json(own / "unet/config.json", addition_embed_type="text_time")
    with pytest.raises(InputError, match="addition_embed_type"):
        load_checkpoint(str(own))


def test_networks_that_do_not_belong_together_are_refused(own: Path) -> None:
    edit_json(own / "vae/config.json", latent_channels=5)
    with pytest.raises(InputError, match="in_channels 4, but the autoencoder's latents are 5 wide"):
        load_checkpoint(str(own), weights="random")
    edit_json(own / "text_encoder/config.json", hidden_size=27)
    with pytest.raises(InputError, match="cross_attention_dim 24, but the text encoder's states are 27 wide"):
        load_checkpoint(str(own), weights="random")


def test_pickled_weights_are_refused_with_a_way_out(own: Path) -> None:
    (own / UNET_FILE).rename(own / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="convert it to safetensors"):
        load_checkpoint(str(own))


def test_tiny_is_found_in_the_package() -> None:
    checkpoint = load_checkpoint("tiny")
    assert checkpoint.name == "tiny"
    assert checkpoint.unet().dtype == torch.float32
