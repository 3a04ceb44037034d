"""How much a unit matters within its group: three measures, to compare.

All are of the gate on a unit (`gates.py`), m = 1 as the network is: the change when m becomes 0.

=========  ==========================================================================================================
magnitude  mean square of the weights that would go; looks at no data
taylor     mean over rows of |dL/dm|, L the error against the true noise: the first-order change of the loss.
           Source: Molchanov et al., arXiv:1611.06440, equation 8
fisher     mean over rows of |d prediction/dm|²: the diagonal of the Gauss-Newton matrix, which is the Hessian of the
           squared distance to the network's own prediction; second order. Source: Theis et al., arXiv:1801.05787,
           section 2.2, with labels drawn from the network itself: a row's derivative of r · prediction, r standard
           normal, has this square as its mean (Hutchinson's estimate)
=========  ==========================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdc.compiler.compress.channels import ChannelGroup, axis_of
from sdc.compiler.compress.gates import GateGradients
from sdc.compiler.compress.probes import Probe
from sdc.compiler.compress.settings import Importance

Scores = dict[str, np.ndarray]
"""For each group by name [units], float64: the more, the more important."""


def magnitudes(unet: UNet2DConditionModel, groups: Sequence[ChannelGroup]) -> Scores:
    """Mean square of each unit's weights, those of all layers together."""
    scores = {}
    for group in groups:
        total = np.zeros(group.units)
        for member in group.members:
            layer: Any = unet.get_submodule(member.layer)
            axis = axis_of(layer, member.side)
            squares = layer.weight.detach().double().square().movedim(axis, 0)
            by_channel = squares.reshape(len(squares), -1).sum(1).cpu().numpy()
            if axis == 0 and layer.bias is not None:
                by_channel = by_channel + layer.bias.detach().double().square().cpu().numpy()
            total += by_channel[member.channels].sum(1)
        scores[group.name] = total / group.unit_parameters
    return scores


def gate_scores(
    unet: UNet2DConditionModel,
    groups: Sequence[ChannelGroup],
    probe: Probe,
    *,
    importance: Importance,
    rows: int,
    seed: int,
) -> Scores:
    """``taylor`` or ``fisher`` over the rows of a probe.

    Args:
        unet: on the probe's device; only its gates get gradients.
        groups: of this UNet.
        probe: the more rows, the less chance in it.
        importance: which.
        rows: at a time.
        seed: of the random directions.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: Scores = {group.name: np.zeros(group.units) for group in groups}
    with GateGradients(unet, groups) as gates:
        for part in probe.split(rows):
            prediction = unet(part.sample.clone().requires_grad_(), part.timesteps, part.states).sample.float()
            if importance == "taylor":
                (prediction - part.truth).square().mean((1, 2, 3)).sum().backward()
            else:
                prediction.backward(random_directions(prediction, generator))
            for name, found in gates.take().items():
                size = found.abs() if importance == "taylor" else found.square()
                sums[name] += size.double().sum(0).cpu().numpy()
    return {name: total / len(probe) for name, total in sums.items()}


def random_directions(prediction: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal, so scaled that a squared derivative is a mean over the prediction's values."""
    drawn = torch.randn(prediction.shape, generator=generator)
    return drawn.to(prediction.device) / math.sqrt(prediction[0].numel())


def score(
    unet: UNet2DConditionModel,
    groups: Sequence[ChannelGroup],
    probe: Probe | None,
    *,
    importance: Importance,
    rows: int,
    seed: int,
) -> Scores:
    """The scores by one of the three measures; magnitude needs no probe."""
    assert importance in get_args(Importance)
    if importance == "magnitude":
        return magnitudes(unet, groups)
    assert probe is not None
    return gate_scores(unet, groups, probe, importance=importance, rows=rows, seed=seed)


def best_units(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` most important units, as rising indices; of equals the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])
