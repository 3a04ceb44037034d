"""One pass over an evaluation's pictures: made in batches, looked at, dropped; what remains are a few numbers each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sdc.compiler.evaluate.metrics import PSNR_CEILING_DB, psnr, ssim
from sdc.compiler.evaluate.verdicts import join_verdicts
from sdc.compiler.tiny.judge import Judge, Verdict

PictureMaker = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""Makes pictures [N, 3, H, W], float32 in [0, 1], of N prompts from N seeds."""

Progress = Callable[[int, int], None]
"""Told how many of how many pictures are done."""


@dataclass(frozen=True)
class Likeness:
    """How alike pairs of pictures are.

    Attributes:
        psnr_db: [N], at most ``PSNR_CEILING_DB``.
        ssim: [N].
    """

    psnr_db: np.ndarray
    ssim: np.ndarray


@dataclass(frozen=True)
class Record:
    """What is kept of a run.

    Attributes:
        bundle: the judge's verdict on the bundle's pictures; None without a judge.
        reference: likewise on the reference's; None without a reference too.
        likeness: of the bundle's and the reference's pictures at equal prompts and seeds.
        other_seed: of the reference's pictures and its own next ones of the same prompt; None if no prompt came twice.
    """

    bundle: Verdict | None
    reference: Verdict | None
    likeness: Likeness | None
    other_seed: Likeness | None


def gather(
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    bundle: PictureMaker,
    reference: PictureMaker | None,
    judge: Judge | None,
    period: int,
    batch: int,
    progress: Callable[[int], None],
) -> Record:
    """Make every picture once with each maker.

    Args:
        prompts: one for each picture; they repeat after `period` pictures.
        seeds: one for each picture.
        bundle: makes the pictures that are evaluated.
        reference: makes those that they are compared with.
        judge: looks at them; None where there is no judge for this model.
        period: pictures until the prompts begin again; no more than these are held in memory.
        batch: pictures made at once.
        progress: told after every batch how many pictures are done.
    """
    verdicts: tuple[list[Verdict], list[Verdict]] = ([], [])
    pairs: list[Likeness] = []
    other_pairs: list[Likeness] = []
    recent: list[np.ndarray] = []
    for begin in range(0, len(prompts), batch):
        part = slice(begin, min(begin + batch, len(prompts)))
        made = bundle(prompts[part], seeds[part])
        if judge is not None:
            verdicts[0].append(_look(judge, made))
        if reference is not None:
            wanted = reference(prompts[part], seeds[part])
            pairs.append(_compare(made, wanted))
            if judge is not None:
                verdicts[1].append(_look(judge, wanted))
            recent.extend(wanted)
            again = len(recent) - period
            if again > 0:
                other_pairs.append(_compare(np.stack(recent[period:]), np.stack(recent[:again])))
                del recent[:again]
        progress(part.stop)
    return Record(
        bundle=join_verdicts(verdicts[0]) if verdicts[0] else None,
        reference=join_verdicts(verdicts[1]) if verdicts[1] else None,
        likeness=_join(pairs),
        other_seed=_join(other_pairs),
    )


def _look(judge: Judge, pictures: np.ndarray) -> Verdict:
    return judge.judge(torch.from_numpy(2 * pictures - 1))


def _compare(left: np.ndarray, right: np.ndarray) -> Likeness:
    return Likeness(np.minimum(psnr(left, right), PSNR_CEILING_DB), ssim(left, right))


def _join(parts: list[Likeness]) -> Likeness | None:
    if not parts:
        return None
    return Likeness(np.concatenate([part.psnr_db for part in parts]), np.concatenate([part.ssim for part in parts]))
