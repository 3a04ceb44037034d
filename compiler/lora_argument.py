"""What a user calls a LoRA: ``FILE[:SCALE]``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sdc.engines.errors import InputError

LORAS = {"tiny-lcm": "models/tiny-lcm-lora.safetensors", "tiny-stripes": "models/tiny-stripes-lora.safetensors"}
"""Short names of LoRAs that ship with sdc, and their files in `sdc.compiler`."""

DISTILLED = "sdc.distill"
"""Key of the metadata under which LoRAs that were trained here have their settings."""

CONSISTENCY = "consistency"
"""In those settings, the objective of a LoRA for few steps."""


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file and how strongly it is applied."""

    path: Path
    scale: float = 1.0

    @property
    def name(self) -> str:
        """Its short name if it ships with sdc, else its absolute path: what finds it again from another folder."""
        short = next((name for name in LORAS if packaged_lora(name) == self.path), None)
        return short or str(self.path.absolute())


@dataclass(frozen=True)
class FoldedLora:
    """A LoRA as a bundle remembers it.

    Attributes:
        file: see `LoraSource.name`.
        scale: how strongly it was applied.
        sha256: of the file.
        few_steps: whether it is one for the sampler lcm.
    """

    file: str
    scale: float
    sha256: str
    few_steps: bool


def packaged_lora(name: str) -> Path:
    """The file of a key of ``LORAS``."""
    return Path(str(files("sdc.compiler").joinpath(LORAS[name])))


def parse_lora(text: str) -> LoraSource:
    """Read ``FILE[:SCALE]``, where the file may be a key of ``LORAS``; a drive letter is part of the file's name.

    Raises:
        InputError: the scale is not a finite number, or there is no file name.
    """
    file, colon, scale_text = text.rpartition(":")
    is_scale = colon and not any(mark in scale_text for mark in ("/", "\\")) and not _is_file_name(scale_text)
    if not is_scale:
        file, scale_text = text, "1"
    try:
        scale = float(scale_text)
    except ValueError:
        scale = math.nan
    if not file or not math.isfinite(scale):
        raise InputError(f"LoRA {text!r} is not FILE[:SCALE]", hint="for example style.safetensors:0.8")
    return LoraSource(packaged_lora(file) if file in LORAS else Path(file), scale)


def _is_file_name(text: str) -> bool:
    return text.lower().endswith(".safetensors")
