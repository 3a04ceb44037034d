"""Small pipelines of Stable Diffusion's classes, with odd and distinct widths, that the tests write to disk."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdc.compiler.load.clip_tokenizer import clip_tokenizer_files
from sdc.compiler.load.folder import read_json, shipped_configs

TEXT_WIDTH = 24
VOCABULARY = 49408


def make_pipeline(
    folder: Path, *, seed: int = 3, linear_projection: bool = False, text_width: int = TEXT_WIDTH
) -> StableDiffusionPipeline:
    """An untrained pipeline whose four UNet blocks, three of them with attention, are those of SD 1.x in small.

    Args:
        folder: the tokenizer's files are put here.
        seed: of the weights.
        linear_projection: as in SD 2.x, instead of SD 1.x's 1x1 convolutions.
        text_width: of the text encoder; divisible by 3.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(12, 24, 36, 48),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=text_width,
        attention_head_dim=3,
        norm_num_groups=6,
        use_linear_projection=linear_projection,
    )
    vae = AutoencoderKL(
        block_out_channels=(6, 12, 18, 24),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=3,
        sample_size=64,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=text_width,
            intermediate_size=5 * text_width,
            num_hidden_layers=2,
            num_attention_heads=3,
            projection_dim=text_width,
            hidden_act="gelu" if linear_projection else "quick_gelu",
        )
    )
    for module in (unet, vae, text_encoder):
        _perturb(module)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=make_tokenizer(folder),
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer, from files put into ``folder``."""
    config = read_json(shipped_configs("sd15") / "tokenizer" / "tokenizer_config.json")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in clip_tokenizer_files(config).items():
        (folder / name).write_bytes(content)
    return CLIPTokenizer.from_pretrained(folder)


def _perturb(module: torch.nn.Module) -> None:
    """Make norm scales and biases differ from 1 and 0, so that exchanging two of them shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))


@torch.no_grad()
def run_unet(unet: torch.nn.Module, *, text_width: int = TEXT_WIDTH) -> torch.Tensor:
    """The UNet's output [3, 4, 8, 16] for fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(3, 4, 8, 16, generator=generator)
    states = torch.randn(3, 7, text_width, generator=generator)
    return unet(sample, torch.tensor([9, 501, 999]), states).sample


@torch.no_grad()
def run_text_encoder(text_encoder: torch.nn.Module) -> torch.Tensor:
    """The text encoder's last hidden state [2, 77, D] for fixed tokens."""
    tokens = torch.randint(0, 590, (2, 77), generator=torch.Generator().manual_seed(6))
    return text_encoder(tokens).last_hidden_state


@torch.no_grad()
def run_vae(vae: torch.nn.Module) -> torch.Tensor:
    """A fixed picture [1, 3, 64, 32], encoded and decoded."""
    picture = torch.rand(1, 3, 64, 32, generator=torch.Generator().manual_seed(7)) * 2 - 1
    return vae.decode(vae.encode(picture).latent_dist.mean).sample
