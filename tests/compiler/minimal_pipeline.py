"""The smallest pipeline with every part that an export has to know, and with unusual sizes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdc.compiler.load.clip_tokenizer import clip_tokenizer_files
from sdc.compiler.load.folder import read_json, shipped_configs

LATENT_CHANNELS = 5
TEXT_WIDTH = 18
GUIDANCE_WIDTH = 14


def save_minimal_pipeline(
    folder: Path,
    *,
    seed: int = 17,
    guidance_width: int | None = GUIDANCE_WIDTH,
    widening: int = 1,
    text_layers: int = 1,
    unet_layers: int = 1,
) -> Path:
    """Write an untrained pipeline: v-prediction, guidance as an input of the UNet, 5 latent channels, VAE factor 4.

    Args:
        folder: gets the pipeline, and beside it the source of its tokenizer.
        seed: of the weights.
        guidance_width: of the guidance; None makes an ordinary UNet without this input.
        widening: how many times wider the UNet and the text encoder are: their weights grow with its square.
        text_layers: of the text encoder.
        unet_layers: pairs of layers in each of the UNet's stages.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=10,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(12 * widening, 24 * widening),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=unet_layers,
        cross_attention_dim=TEXT_WIDTH * widening,
        attention_head_dim=2,
        norm_num_groups=6,
        time_cond_proj_dim=guidance_width,
    )
    vae = AutoencoderKL(
        block_out_channels=(6, 9, 12),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=3,
        sample_size=40,
        scaling_factor=0.31,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=TEXT_WIDTH * widening,
            intermediate_size=50 * widening,
            num_hidden_layers=text_layers,
            num_attention_heads=3,
            projection_dim=TEXT_WIDTH * widening,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    for module in (unet, vae, text_encoder):
        for parameter in module.parameters():
            if parameter.ndim == 1:  # norms and biases unlike 1 and 0, so that leaving one out shows
                parameter.data += torch.empty_like(parameter).uniform_(-0.3, 0.3)
    StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=_tokenizer(folder / "source_of_tokenizer"),
        unet=unet.eval(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "minimal")
    return folder / "minimal"


def _tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True)
    config = read_json(shipped_configs("sd15") / "tokenizer" / "tokenizer_config.json")
    for name, content in clip_tokenizer_files(config).items():
        (folder / name).write_bytes(content)
    return CLIPTokenizer.from_pretrained(folder)
