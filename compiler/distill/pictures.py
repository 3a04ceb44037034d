"""What a distillation learns from: pictures with captions, encoded to latents once."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor

from sdc.compiler.load.tensor_files import digest_files, read_metadata, read_tensors
from sdc.compiler.tiny.captions import BACKGROUNDS, TEMPLATES, caption
from sdc.compiler.tiny.data import GreyPictures, load_grey_pictures, render
from sdc.compiler.tiny.train_unet import allowed_colours
from sdc.engines.errors import InputError

METADATA_FILE = "metadata.jsonl"
CHUNK = 64

Paint = Callable[[np.ndarray], np.ndarray]
"""Changes the pixels of grey pictures."""


class Pictures(ABC):
    """Pictures with captions.

    Attributes:
        captions: of each picture, one or several that say the same.
        digest: equal for equal pictures and captions.
        chunk: how many to read at once.
    """

    captions: Sequence[Sequence[str]]
    digest: str
    chunk: int

    def __len__(self) -> int:
        return len(self.captions)

    @abstractmethod
    def read(self, begin: int, end: int) -> Tensor:
        """Pictures `begin` to `end`: [N, 3, H, W], float32 in [-1, 1]."""


class TinyPictures(Pictures):
    """The training data of `tiny`: each garment in one random colour on one random background, held-out pairs left out.

    Args:
        folder: of the gzipped IDX files.
        seed: of colours and backgrounds.
        paint: what becomes of grey pictures [N, 28, 28] before they are coloured; None leaves them.
        count: the first so many pictures; None for all.
        garments: only pictures of these, indices into `GARMENTS`; None for all.

    Raises:
        InputError: a file is missing or is not in IDX format.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        paint: Paint | None = None,
        count: int | None = None,
        garments: Collection[int] | None = None,
    ) -> None:
        everything = load_grey_pictures(folder, "train")
        wanted = slice(None) if garments is None else np.isin(everything.garments, list(garments))
        data = GreyPictures(everything.pixels[wanted][:count], everything.garments[wanted][:count])
        random = np.random.default_rng(seed)
        self._pixels = data.pixels if paint is None else paint(data.pixels)
        self._colours = allowed_colours(data.garments, random)
        self._backgrounds = random.integers(len(BACKGROUNDS), size=len(data.pixels))
        labels = zip(data.garments.tolist(), self._colours.tolist(), self._backgrounds.tolist(), strict=True)
        self.captions = [tuple(caption(*each, template) for template in range(len(TEMPLATES))) for each in labels]
        self.digest = hashlib.sha256(
            self._pixels.tobytes() + json.dumps([seed, self.captions[:999]]).encode()
        ).hexdigest()
        self.chunk = 500

    def read(self, begin: int, end: int) -> Tensor:
        """Pictures `begin` to `end`: [N, 3, 32, 32], float32 in [-1, 1]."""
        part = slice(begin, end)
        return render(self._pixels[part], self._colours[part], self._backgrounds[part])


class FolderPictures(Pictures):
    """A folder in the form of Hugging Face's imagefolder: pictures beside a ``metadata.jsonl`` of file_name and text.

    Each picture is scaled and cut around its centre to one size.

    Args:
        folder: of both.
        size_px: (height, width) of the pictures to learn from.

    Raises:
        InputError: the folder, its metadata, a caption or a picture is missing or cannot be read.
    """

    def __init__(self, folder: Path, *, size_px: tuple[int, int]) -> None:
        entries = _read_entries(folder)
        self._size_px = size_px
        self._paths = [folder / name for name, _ in entries]
        for path in self._paths:
            if not path.is_file():
                raise InputError(
                    f"picture {path} is named in {METADATA_FILE} but is not there", hint="correct file_name"
                )
        self.captions = [(text,) for _, text in entries]
        described = [size_px, entries, digest_files(self._paths)]
        self.digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        self.chunk = 1

    def read(self, begin: int, end: int) -> Tensor:
        """Pictures `begin` to `end`: [N, 3, H, W], float32 in [-1, 1]."""
        return torch.stack([_read_picture(path, self._size_px) for path in self._paths[begin:end]])


def _read_entries(folder: Path) -> list[tuple[str, str]]:
    """(file name, caption) of every line."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} of pictures", hint=f"give one that holds a {METADATA_FILE}")
    path = folder / METADATA_FILE
    form = '{"file_name": "a.png", "text": "its caption"}'
    if not path.is_file():
        raise InputError(f"{folder} has no {METADATA_FILE}", hint=f"write a line {form} for each picture")
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}", hint=f"expected {form}") from error
        for key in ("file_name", "text"):
            if not isinstance(value, dict) or not isinstance(value.get(key), str) or not value[key].strip():
                raise InputError(f"{path}, line {number} has no {key}", hint=f"expected {form}")
        entries.append((value["file_name"], value["text"]))
    if not entries:
        raise InputError(f"{path} names no picture", hint=f"write a line {form} for each")
    return entries


def _read_picture(path: Path, size_px: tuple[int, int]) -> Tensor:
    """[3, H, W], float32 in [-1, 1]."""
    height, width = size_px
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"picture {path} cannot be read: {error}", hint="convert it, or take it out") from error
    pixels = torch.from_numpy(np.array(fitted, np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1


@dataclass(frozen=True)
class Latents:
    """Encoded pictures: a latent of one is ``mean + deviation · noise``.

    Attributes:
        mean: [N, C, H, W], float32, scaled to unit variance; ``deviation`` likewise.
    """

    mean: Tensor
    deviation: Tensor


def encode_once(
    pictures: Pictures,
    vae: AutoencoderKL,
    path: Path,
    *,
    vae_digest: str,
    device: torch.device,
    tell: Callable[[str], None],
) -> Latents:
    """The pictures' latents, from `path` if they are there already.

    Args:
        pictures: what to encode.
        vae: on `device`.
        path: keeps the latents for the next run.
        vae_digest: of its weights.
        device: to encode on.
        tell: receives lines of progress.
    """
    described = {"pictures": pictures.digest, "vae": vae_digest}
    if path.is_file() and read_metadata(path) == described:
        stored = read_tensors(path)
        return Latents(stored["mean"], stored["deviation"])
    latents = _encode(pictures, vae, device=device, tell=tell)
    unfinished = path.with_suffix(".unfinished")
    save_file(vars(latents), unfinished, metadata=described)
    unfinished.replace(path)
    return latents


@torch.no_grad()
def _encode(pictures: Pictures, vae: AutoencoderKL, *, device: torch.device, tell: Callable[[str], None]) -> Latents:
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    means, deviations = [], []
    tenth = max(pictures.chunk, len(pictures) // 10)
    for begin in range(0, len(pictures), pictures.chunk):
        if begin % tenth < pictures.chunk:
            tell(f"encoding pictures: {begin} of {len(pictures)}")
        read = pictures.read(begin, min(begin + pictures.chunk, len(pictures)))
        posterior = vae.encode(read.to(device, memory_format=torch.channels_last)).latent_dist
        means.append(((posterior.mean - shift) * scale).float().cpu())
        deviations.append((posterior.std * scale).float().cpu())
    return Latents(torch.cat(means).contiguous(), torch.cat(deviations).contiguous())
