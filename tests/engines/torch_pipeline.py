"""Small untrained diffusers pipelines, and sdc's `Pipeline` around the very same torch modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel

from sdc.compiler.tiny.train_tokenizer import train_tokenizer
from sdc.engines.manifest import PipelineSettings
from sdc.engines.pipeline import Pipeline
from sdc.engines.schedule_config import schedule_from_config
from sdc.engines.session import Run
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.tokenizer import load_tokenizer

SD15_SCHEDULE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

CAPTIONS = ["a photo of a red sneaker on a white background", "a blue bag, black background"]


class TorchSession:
    """A `Session` around a torch module."""

    def __init__(self, spec: ComponentSpec, module: torch.nn.Module) -> None:
        self.spec = spec
        self.module = module
        self.rows: list[int] = []
        self.closed = False

    @property
    def memory_bytes(self) -> int:
        return 0

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert not self.closed
        assert set(feeds) == {tensor.name for tensor in self.spec.inputs}
        for tensor in self.spec.inputs:
            assert feeds[tensor.name].dtype.name == tensor.dtype
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        self.rows.append(len(feeds[self.spec.inputs[0].name]))
        with torch.no_grad():
            return {self.spec.outputs[0].name: self._call(tensors).numpy()}

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        return lambda others: self.run({**feeds, **others})

    def _call(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        match self.spec.name:
            case "text_encoder":
                return self.module(tensors["input_ids"]).last_hidden_state
            case "unet":
                condition = tensors.get("timestep_cond")
                states = tensors["encoder_hidden_states"]
                return self.module(tensors["sample"], tensors["timestep"], states, timestep_cond=condition).sample
            case _:
                return self.module.decode(tensors["latent_sample"]).sample

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class Architecture:
    """What varies between the pipelines under test."""

    name: str
    latent_channels: int = 4
    prediction_type: str = "epsilon"
    time_cond_proj_dim: int | None = None
    scaling_factor: float = 0.18215
    vae_blocks: int = 3


ARCHITECTURES = (
    Architecture("epsilon"),
    Architecture("velocity", latent_channels=5, prediction_type="v_prediction", vae_blocks=2, scaling_factor=0.61),
    Architecture("consistency", latent_channels=6, time_cond_proj_dim=37, vae_blocks=2),
)


def build_diffusers(architecture: Architecture, folder: Path) -> StableDiffusionPipeline:
    """An untrained pipeline with seeded weights; its tokenizer's files are left in `folder`/tokenizer."""
    torch.manual_seed(17)
    tokenizer = train_tokenizer(CAPTIONS, folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=architecture.latent_channels,
        out_channels=architecture.latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=2,
        time_cond_proj_dim=architecture.time_cond_proj_dim,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * architecture.vae_blocks,
        up_block_types=("UpDecoderBlock2D",) * architecture.vae_blocks,
        block_out_channels=(8, 16, 24)[: architecture.vae_blocks],
        norm_num_groups=8,
        latent_channels=architecture.latent_channels,
        sample_size=8 * 2 ** (architecture.vae_blocks - 1),
        scaling_factor=architecture.scaling_factor,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(**SD15_SCHEDULE, prediction_type=architecture.prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings_of(pipeline: StableDiffusionPipeline) -> PipelineSettings:
    sample_size_px = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return PipelineSettings(
        vae_scaling_factor=pipeline.vae.config.scaling_factor,
        vae_shift_factor=0.0,
        vae_reduction=pipeline.vae_scale_factor,
        latent_channels=pipeline.unet.config.in_channels,
        default_height_px=sample_size_px,
        default_width_px=sample_size_px,
        max_tokens=pipeline.tokenizer.model_max_length,
        time_cond_proj_dim=pipeline.unet.config.time_cond_proj_dim,
    )


def specs_of(pipeline: StableDiffusionPipeline) -> dict[str, ComponentSpec]:
    """Interfaces that allow 1 to 6 rows and latents of 4 to 16 in steps of 2."""
    channels = pipeline.unet.config.in_channels
    dimensions = {"B": DimensionRange(1, 2, 6), "H": DimensionRange(4, 8, 16, 2), "W": DimensionRange(4, 8, 16, 2)}
    states = ("B", 77, pipeline.unet.config.cross_attention_dim)
    unet_inputs = [
        TensorSpec("sample", "float32", ("B", channels, "H", "W")),
        TensorSpec("timestep", "float32", (1,)),
        TensorSpec("encoder_hidden_states", "float32", states),
    ]
    if pipeline.unet.config.time_cond_proj_dim is not None:
        unet_inputs.append(TensorSpec("timestep_cond", "float32", ("B", pipeline.unet.config.time_cond_proj_dim)))
    inputs: dict[str, list[TensorSpec]] = {
        "text_encoder": [TensorSpec("input_ids", "int64", ("B", 77))],
        "unet": unet_inputs,
        "vae_decoder": [TensorSpec("latent_sample", "float32", ("B", channels, "H", "W"))],
    }
    outputs = {
        "text_encoder": TensorSpec("last_hidden_state", "float32", states),
        "unet": TensorSpec("out_sample", "float32", ("B", channels, "H", "W")),
        "vae_decoder": TensorSpec("sample", "float32", ("B", 3, "H'", "W'")),
    }
    return {name: ComponentSpec(name, tuple(inputs[name]), (outputs[name],), dimensions) for name in inputs}


def build_ours(
    pipeline: StableDiffusionPipeline, tokenizer_folder: Path, *, keep_loaded: bool = True
) -> tuple[Pipeline, dict[str, TorchSession]]:
    """Our pipeline around the modules of a diffusers pipeline, and the sessions that it has loaded so far."""
    specs = specs_of(pipeline)
    modules = {"text_encoder": pipeline.text_encoder, "unet": pipeline.unet, "vae_decoder": pipeline.vae}
    loaded: dict[str, TorchSession] = {}

    def load_session(component: str) -> TorchSession:
        loaded[component] = TorchSession(specs[component], modules[component])
        return loaded[component]

    config: dict[str, Any] = dict(pipeline.scheduler.config)
    ours = Pipeline(
        tokenizer=load_tokenizer(tokenizer_folder),
        schedule=schedule_from_config(config),
        settings=settings_of(pipeline),
        specs=specs,
        load_session=load_session,
        keep_loaded=keep_loaded,
        provenance={"model": "untrained"},
    )
    return ours, loaded
