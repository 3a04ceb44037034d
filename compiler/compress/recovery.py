"""The loss by which a pruned student learns to answer as its teacher does: predictions, guided ones, and features.

Source: Kim et al., "BK-SDM", arXiv:2305.15798, section 3.2 (output and feature distillation); guided predictions as in
Meng et al., arXiv:2210.03142, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdc.compiler.compress.low_rank import Spans, project_parameters
from sdc.compiler.compress.probes import Probe

PAIRED_SHARE = 4
"""One picture in so many is also predicted without its caption, so that guided predictions can be compared."""


@dataclass(frozen=True)
class RecoveryBatch:
    """What one step learns from.

    Attributes:
        probe: [B] noisy latents with captions.
        unconditional: [P, T, D]: states of the empty caption, for the first P of them.
        guidance: [P], float32: guidance scales; 1 is none.
    """

    probe: Probe
    unconditional: Tensor
    guidance: Tensor


def recovery_loss(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, batch: RecoveryBatch, *, feature_weight: float
) -> Tensor:
    """Mean square of the student's difference from the teacher, of three things.

    The predictions; the guided predictions u + w (c - u), over w² + (1 - w)², by which guidance enlarges errors of c
    and u that are independent; and, times `feature_weight`, what each stage gives, over the mean square of the
    teacher's.
    """
    probe, pairs = batch.probe, len(batch.guidance)
    rows = len(probe)
    inputs = (
        torch.cat([probe.sample, probe.sample[:pairs]]),
        torch.cat([probe.timesteps, probe.timesteps[:pairs]]),
        torch.cat([probe.states, batch.unconditional]),
    )
    with torch.no_grad(), stage_outputs(teacher) as wanted_features:
        wanted = teacher(*inputs).sample.float()
    with stage_outputs(student) as found_features:
        found = student(*inputs).sample.float()
    error = found - wanted
    weight = batch.guidance[:, None, None, None]
    guided = weight * error[:pairs] + (1 - weight) * error[rows:]
    guided_loss = (guided.square() / (weight.square() + (1 - weight).square())).mean()
    loss: Tensor = error[:rows].square().mean() + guided_loss
    shared = [name for name in found_features if name in wanted_features]
    if feature_weight and shared:
        unlike = [_relative_square(found_features[name], wanted_features[name]) for name in shared]
        loss = loss + feature_weight * torch.stack(unlike).mean()
    return loss


@torch.no_grad()
def move_average(average: nn.Module, student: nn.Module, *, decay: float, spans: Spans) -> None:
    """Move averaged weights towards the student's, in place.

    Args:
        average: has the result.
        student: of the same layers.
        decay: share of the average that stays.
        spans: of the weights of low rank, on the networks' device. The average of weights on a span is on it but for
            rounding, which adds up over thousands of steps.
    """
    torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - decay)
    project_parameters(average, spans)


def _relative_square(found: Tensor, wanted: Tensor) -> Tensor:
    wanted = wanted.float()
    return (found.float() - wanted).square().mean() / wanted.square().mean()


@contextmanager
def stage_outputs(unet: UNet2DConditionModel) -> Iterator[dict[str, Tensor]]:
    """Filled by the calls within the block: the hidden states that each stage of the UNet gives, by its name."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    stages = {
        **{f"down_blocks.{i}": each for i, each in enumerate(unet.down_blocks)},
        **({} if unet.mid_block is None else {"mid_block": unet.mid_block}),
        **{f"up_blocks.{i}": each for i, each in enumerate(unet.up_blocks)},
    }
    with ExitStack() as stack:
        for name, stage in stages.items():
            stack.callback(stage.register_forward_hook(keep(name)).remove)
        yield found
