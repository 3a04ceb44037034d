"""What the judge saw in real pictures: made once after training, shipped, and compared with by every evaluation.

File format (safetensors, format ``sdc-statistics-1``): for each set S of ``real`` and ``reconstructed`` the tensors
``S.mean`` [64] and ``S.covariance`` [64, 64], float64, of the judge's features; ``latents`` [L, 4, H, W], float32,
clean latents times the scaling factor, and ``latents.triples`` [L, 3], int64, what they show. The metadata's one key is
``sdc-statistics-1``, JSON with ``seed``, ``pictures`` (how many each covariance was fitted to), ``judge`` (SHA-256 of
its weights) and ``figures`` (see `Statistics`); safetensors would write several keys in an order that changes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sdc.compiler.evaluate.frechet import Gaussian, frechet_distance
from sdc.compiler.evaluate.metrics import psnr, ssim
from sdc.compiler.evaluate.verdicts import accuracies, agreement, digest_of, join_verdicts, require_file
from sdc.compiler.tiny.captions import BACKGROUNDS, COLOURS
from sdc.compiler.tiny.data import GreyPictures, render
from sdc.compiler.tiny.judge import Judge, Verdict
from sdc.engines.errors import InputError

FORMAT = "sdc-statistics-1"
MODELS_FOLDER = Path(__file__).parent.parent / "models"
"""Where the package's judge and statistics lie."""

LATENTS = 64
BATCH = 250


@dataclass(frozen=True)
class Statistics:
    """Real pictures as the judge sees them, and the autoencoder's floor.

    Attributes:
        real: features of real test pictures in balanced colours and backgrounds.
        reconstructed: features of the same pictures after the autoencoder.
        latents: [L, 4, H, W], float32, clean latents times the scaling factor.
        triples: [L, 3], int64, (garment, colour, background) of each.
        judge_digest: SHA-256 of the judge's weights that all this was seen with.
        figures: accuracies (fractions) ``real_garment``, ``real_colour``, ``real_background`` and ``real_all`` three,
            the same with ``reconstructed_``; ``reconstruction_psnr_db``, ``reconstruction_ssim`` and
            ``reconstruction_frechet``; and ``sampling_frechet``: samples of n and m real pictures are about
            ``sampling_frechet * (1/n + 1/m)`` apart.
    """

    real: Gaussian
    reconstructed: Gaussian
    latents: np.ndarray
    triples: np.ndarray
    judge_digest: str
    figures: dict[str, float]


def make_statistics(
    test: GreyPictures, judge: Judge, vae: AutoencoderKL, judge_path: Path, *, seed: int, latents: int = LATENTS
) -> Statistics:
    """Look at every picture of the test split once, in colours that are balanced within each garment.

    Args:
        test: real pictures that neither the model nor the judge was trained on.
        judge: in evaluation mode; likewise `vae`.
        vae: the trained autoencoder, its scaling factor in its configuration.
        judge_path: the file that `judge` came from, for its digest.
        seed: of the colours and of the choice of latents.
        latents: how many clean latents to keep.
    """
    triples = balanced_triples(test.garments, seed=seed)
    real, reconstructed, likeness = _look(test, triples, judge, vae)
    halves = real.features.numpy()[0::2], real.features.numpy()[1::2]
    apart = frechet_distance(Gaussian.fit(halves[0]), Gaussian.fit(halves[1]))
    everything = Gaussian.fit(real.features.numpy())
    decoded = Gaussian.fit(reconstructed.features.numpy())
    chosen = np.sort(np.random.default_rng(seed).permutation(len(triples))[:latents])
    return Statistics(
        real=everything,
        reconstructed=decoded,
        latents=_encode(vae, render(test.pixels[chosen], triples[chosen, 1], triples[chosen, 2])),
        triples=triples[chosen],
        judge_digest=digest_of(judge_path),
        figures={
            **{f"real_{name}": value for name, value in accuracies(agreement(real, triples)).items()},
            **{f"reconstructed_{name}": value for name, value in accuracies(agreement(reconstructed, triples)).items()},
            **likeness,
            "reconstruction_frechet": frechet_distance(decoded, everything),
            "sampling_frechet": apart / (1 / len(halves[0]) + 1 / len(halves[1])),
        },
    )


def _look(
    test: GreyPictures, triples: np.ndarray, judge: Judge, vae: AutoencoderKL
) -> tuple[Verdict, Verdict, dict[str, float]]:
    """What the judge sees in the pictures and in their reconstructions, and how alike the two are."""
    seen, seen_again, likeness = [], [], []
    for begin in range(0, len(triples), BATCH):
        part = triples[begin : begin + BATCH]
        pictures = render(test.pixels[begin : begin + BATCH], part[:, 1], part[:, 2])
        decoded = _reconstruct(vae, pictures)
        seen.append(judge.judge(pictures))
        seen_again.append(judge.judge(decoded))
        left, right = pictures.numpy(), decoded.numpy()
        likeness.append(np.column_stack([psnr(left, right, data_range=2), ssim(left, right, data_range=2)]))
    mean_psnr, mean_ssim = np.concatenate(likeness).mean(axis=0).tolist()
    figures = {"reconstruction_psnr_db": mean_psnr, "reconstruction_ssim": mean_ssim}
    return join_verdicts(seen), join_verdicts(seen_again), figures


def balanced_triples(garments: np.ndarray, *, seed: int) -> np.ndarray:
    """Give every garment each (colour, background) equally often, in a seeded order.

    Args:
        garments: [N], indices.

    Returns:
        [N, 3], int64: garment, colour, background.
    """
    random = np.random.default_rng(seed)
    pairs = np.empty(len(garments), np.int64)
    for garment in np.unique(garments):
        where = np.flatnonzero(garments == garment)
        pairs[where] = random.permutation(len(where)) % (len(COLOURS) * len(BACKGROUNDS))
    return np.column_stack([garments, pairs // len(BACKGROUNDS), pairs % len(BACKGROUNDS)]).astype(np.int64)


@torch.no_grad()
def _reconstruct(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Encode to the mean and decode again: [N, 3, H, W] in [-1, 1]."""
    decoded: torch.Tensor = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    return decoded.clamp(-1, 1)


@torch.no_grad()
def _encode(vae: AutoencoderKL, pictures: torch.Tensor) -> np.ndarray:
    latents: torch.Tensor = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
    return latents.numpy()


def save_statistics(statistics: Statistics, path: Path, *, seed: int) -> None:
    """Write the file that `load_statistics` reads; the same statistics give the same bytes."""
    tensors = {
        "real.mean": statistics.real.mean,
        "real.covariance": statistics.real.covariance,
        "reconstructed.mean": statistics.reconstructed.mean,
        "reconstructed.covariance": statistics.reconstructed.covariance,
        "latents": np.ascontiguousarray(statistics.latents),
        "latents.triples": np.ascontiguousarray(statistics.triples),
    }
    metadata = {
        "seed": seed,
        "pictures": statistics.real.count,
        "judge": statistics.judge_digest,
        "figures": statistics.figures,
    }
    save_file(tensors, path, metadata={FORMAT: json.dumps(metadata, sort_keys=True)})


def load_statistics(path: Path, *, judge_path: Path) -> Statistics:
    """Read statistics that belong to the judge at `judge_path`.

    Raises:
        InputError: a file is missing or damaged, or the statistics were made with another judge.
    """
    require_file(path)
    try:
        with safe_open(path, "numpy") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read: {error}", hint="install sdc again") from error
    if FORMAT not in found:
        raise InputError(f"{path} should have the format {FORMAT}, found {', '.join(found) or 'none'}")
    metadata = json.loads(found[FORMAT])
    if metadata["judge"] != digest_of(judge_path):
        raise InputError(f"{path} was made with another judge than {judge_path}", hint="make the statistics again")
    count = metadata["pictures"]
    return Statistics(
        real=Gaussian(tensors["real.mean"], tensors["real.covariance"], count),
        reconstructed=Gaussian(tensors["reconstructed.mean"], tensors["reconstructed.covariance"], count),
        latents=tensors["latents"],
        triples=tensors["latents.triples"],
        judge_digest=metadata["judge"],
        figures=metadata["figures"],
    )
