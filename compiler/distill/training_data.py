"""What a training step draws: latents of pictures with noise and captions, from generators of the step's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextModel

from sdc.compiler.distill.pictures import Latents, Pictures, encode_once
from sdc.compiler.distill.training_loop import Reporting
from sdc.compiler.half_stage import open_tokenizer
from sdc.compiler.load import Checkpoint
from sdc.compiler.tiny.memory_layout import channels_last
from sdc.engines.tokenizer import ClipTokenizer

LATENTS = "latents.safetensors"
"""Name of the encoded pictures in a run's folder."""


@dataclass(frozen=True)
class Draw:
    """What every kind of training needs of a step.

    Attributes:
        clean: [B, C, H, W], float32: latents of pictures.
        noise: [B, C, H, W], float32.
        captions: one of each picture's.
        generator: to draw the rest of the step from.
    """

    clean: Tensor
    noise: Tensor
    captions: list[str]
    generator: torch.Generator


class TrainingData:
    """Pictures as latents, with the networks that encode pictures and captions.

    Args:
        checkpoint: has the networks.
        pictures: are encoded once; the latents are kept in the run's folder.
        device: of the networks.
        reporting: names the folder, and is told of progress.
    """

    def __init__(
        self, checkpoint: Checkpoint, pictures: Pictures, *, device: torch.device, reporting: Reporting
    ) -> None:
        self.pictures, self.device = pictures, device
        self.tokenizer = tokenizer_of(checkpoint)
        self.text_encoder = checkpoint.text_encoder().to(device)
        self.vae = channels_last(checkpoint.vae()).to(device)
        path, digest = Path(reporting.folder, LATENTS), checkpoint.digest("vae_encoder")
        self.latents: Latents = encode_once(
            pictures, self.vae, path, vae_digest=digest, device=device, tell=reporting.tell
        )

    @property
    def latent_size(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.latents.mean.shape[1:])

    def draw(self, step: int, *, batch: int, seed: int, among: int | None = None, empty_captions: float = 0.0) -> Draw:
        """The pictures and the noise of a step.

        Args:
            step: has a generator of its own, so that a run that goes on at it needs no state.
            batch: pictures.
            seed: of the run.
            among: only the first so many pictures; None for all.
            empty_captions: share of captions that are left empty.
        """
        random = np.random.default_rng((seed, step))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = random.integers(among or len(self.pictures), size=batch)
        captions = [_draw_one(self.pictures.captions[i], random) for i in chosen.tolist()]
        if empty_captions:
            empty = random.random(batch) < empty_captions
            captions = ["" if left_empty else text for text, left_empty in zip(captions, empty, strict=True)]
        mean, deviation = self.latents.mean[chosen], self.latents.deviation[chosen]
        clean = mean + deviation * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        return Draw(clean, noise, captions, generator)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Their states, [N, T, D], float32."""
        return encode_texts(self.tokenizer, self.text_encoder, captions)


def _draw_one(captions: Sequence[str], random: np.random.Generator) -> str:
    return captions[int(random.integers(len(captions)))]


def tokenizer_of(checkpoint: Checkpoint) -> ClipTokenizer:
    """The tokenizer in a checkpoint's files."""
    files = {f"tokenizer/{name}": content for name, content in checkpoint.tokenizer_files.items()}
    return open_tokenizer(files, {name: source.config for name, source in checkpoint.networks.items()})


@torch.no_grad()
def encode_texts(tokenizer: ClipTokenizer, text_encoder: CLIPTextModel, texts: Sequence[str]) -> Tensor:
    """States of prompts or captions, [N, T, D], float32, on the text encoder's device."""
    tokens = torch.from_numpy(tokenizer.encode(texts)).to(text_encoder.device)
    states: Tensor = text_encoder(tokens).last_hidden_state
    return states
