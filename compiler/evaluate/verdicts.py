"""The judge's verdicts on pictures, and how often they agree with what the prompts say."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sdc.compiler.tiny.captions import HELD_OUT
from sdc.compiler.tiny.judge import Judge, Verdict
from sdc.engines.errors import InputError

ASPECTS = ("garment", "colour", "background")


def load_judge(path: Path) -> Judge:
    """Load a judge, of whatever width, in evaluation mode.

    Raises:
        InputError: the file is missing or does not hold a judge.
    """
    require_file(path)
    try:
        weights = load_file(path)
        judge = Judge(width=len(weights["first.1.weight"]))
        judge.load_state_dict(weights)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} does not hold a judge's weights: {error}", hint="install sdc again") from error
    return judge.eval()


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        InputError: the file is missing.
    """
    require_file(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def require_file(path: Path) -> None:
    """Raise an InputError unless the file, which the package should hold, is there."""
    if not path.is_file():
        raise InputError(f"{path} not found", hint="install sdc again, or make it with scripts/train_tiny.py")


def join_verdicts(parts: Sequence[Verdict]) -> Verdict:
    """One verdict on the pictures of several."""
    names = ("features", "garments", "colours", "backgrounds")
    return Verdict(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def agreement(verdict: Verdict, triples: np.ndarray) -> np.ndarray:
    """Whether the judge sees what the prompt says.

    Args:
        verdict: on N pictures.
        triples: [N, 3], the (garment, colour, background) that each prompt names.

    Returns:
        [N, 3], bool.
    """
    seen = np.column_stack([part.numpy() for part in (verdict.garments, verdict.colours, verdict.backgrounds)])
    return np.asarray(seen == triples)


def accuracies(correct: np.ndarray) -> dict[str, float]:
    """Fractions of right pictures for each aspect and for ``all`` three, from `agreement`'s [N, 3]."""
    return dict(zip(ASPECTS, correct.mean(axis=0).tolist(), strict=True)) | {"all": float(correct.all(axis=1).mean())}


def is_held_out(triples: np.ndarray) -> np.ndarray:
    """[N], bool: whether the (garment, colour) pair was kept from the UNet's training."""
    return np.array([(int(garment), int(colour)) in HELD_OUT for garment, colour, _ in triples], bool)
