"""Pictures of both sides at equal prompts and seeds, and the denoising runs that made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdc.compiler.compare.denoising import Denoising, DenoisingRecorder
from sdc.compiler.evaluate.metrics import PSNR_CEILING_DB, SSIM_WINDOW, psnr, ssim
from sdc.compiler.evaluate.opened import OpenedBundle, opened
from sdc.compiler.evaluate.settings import Settings, prompts_of_model
from sdc.engines.denoise import Latents
from sdc.engines.errors import InputError


@dataclass(frozen=True)
class PictureComparison:
    """How far the pictures of both sides lie apart.

    Attributes:
        prompts: of each pair; likewise ``seeds``.
        psnr_db: of each pair, before rounding to 8 bits; at most ``PSNR_CEILING_DB``.
        ssim: likewise; None for pictures smaller than its window.
        settings: how they were made.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...] | None
    settings: Settings


@dataclass(frozen=True)
class PicturePairs:
    """The pictures themselves: [N, 3, H, W] each, float32 in [0, 1]."""

    first: np.ndarray
    second: np.ndarray


def compare_pictures(
    first: Path,
    second: Path,
    settings: Settings,
    *,
    prompts: Sequence[str] | None,
    say: Callable[[str], None],
) -> tuple[Denoising, PictureComparison, PicturePairs]:
    """Make the pictures of two bundles, watching every step.

    Args:
        first: a bundle; its trajectory is the one that both UNets are driven along.
        second: likewise.
        settings: number and making of the pictures.
        prompts: used in turn; None takes those of the first side's model.
        say: told of every batch.

    Raises:
        InputError: the two do not make pictures of one size.
    """
    with opened(first, settings) as one, opened(second, settings) as other:
        wanted = settings.samples
        chosen = (
            [prompts[i % len(prompts)] for i in range(wanted)]
            if prompts
            else prompts_of_model(one.manifest.model.name, wanted)
        )
        seeds = settings.picture_seeds()
        batch = min(one.largest_batch(), other.largest_batch(), settings.batch or wanted)
        recorder = DenoisingRecorder(one, other)
        made: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for begin in range(0, wanted, batch):
            rows = slice(begin, begin + batch)
            say(f"pictures {begin + 1} to {min(begin + batch, wanted)} of {wanted}")
            for side, latents, pictures in zip(
                (one, other), recorder.run(chosen[rows], seeds[rows]), made, strict=True
            ):
                pictures.append(_decode(side, latents))
    pairs = PicturePairs(*(np.concatenate(pictures) for pictures in made))
    return recorder.result(), _measure(pairs, chosen, seeds, settings), pairs


def _decode(side: OpenedBundle, latents: Latents) -> np.ndarray:
    return np.clip(side.pipeline.decode(latents) / 2 + np.float32(0.5), 0, 1)


def _measure(pairs: PicturePairs, prompts: list[str], seeds: list[int], settings: Settings) -> PictureComparison:
    first, second = pairs.first, pairs.second
    if first.shape != second.shape:
        raise InputError(f"the pictures have the shapes {first.shape} and {second.shape}", hint="compare one model")
    large_enough = min(first.shape[2:]) >= SSIM_WINDOW
    return PictureComparison(
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        psnr_db=tuple(np.minimum(psnr(first, second), PSNR_CEILING_DB).tolist()),
        ssim=tuple(ssim(first, second).tolist()) if large_enough else None,
        settings=settings,
    )
