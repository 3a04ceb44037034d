"""One round of pruning: which units of which groups go from a network as it is now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from sdc.compiler.compress.budgets import Curve, allocate, measure_curves, steps_of_curves, uniform_steps
from sdc.compiler.compress.channels import KINDS, ChannelGroup, find_groups
from sdc.compiler.compress.elastic import choose_elastic
from sdc.compiler.compress.importance import best_units, score
from sdc.compiler.compress.probes import Probe
from sdc.compiler.compress.prune import UnetState, prune
from sdc.compiler.compress.settings import CompressSettings


@dataclass(frozen=True)
class Pruned:
    """What a round came to.

    Attributes:
        state: the network without the units that went; what stays whole is shared with the one before.
        groups: of the network before.
        kept_units: of the groups that lost any, by name.
        curves: the measured error of each group by units kept; empty with uniform budgets.
        off: units that stay, but switched off; see `elastic.py`.
    """

    state: UnetState
    groups: tuple[ChannelGroup, ...]
    kept_units: dict[str, int]
    curves: dict[str, Curve]
    off: dict[str, list[list[int]]]

    def to_json(self) -> dict[str, Any]:
        """Every group with its channels before and after, and its curve in channels, for the report."""
        return {
            "parameters": self.state.parameters,
            "groups": [
                {
                    "name": group.name,
                    "kind": group.kind,
                    "channels": group.width,
                    "kept": self.kept_units.get(group.name, group.units) * group.unit_channels,
                    "unit": group.unit_channels,
                    "unit_parameters": group.unit_parameters,
                    "error_by_channels": {
                        str(units * group.unit_channels): error
                        for units, error in self.curves.get(group.name, {}).items()
                    },
                }
                for group in self.groups
            ],
            **({"elastic": self.off} if self.off else {}),
        }


def prune_round(
    state: UnetState,
    probe: Probe | None,
    settings: CompressSettings,
    *,
    goal: int,
    elastic: float = 0.0,
    seed: int,
    device: torch.device,
    tell: Callable[[str], None],
) -> Pruned:
    """Remove units until at most `goal` parameters are left.

    Args:
        state: the network as it is now.
        probe: on `device`; None if nothing is measured.
        settings: of the run.
        goal: number of parameters, those of elastic channels among them.
        elastic: share of units that stay switched off.
        seed: of random directions.
        device: to measure on.
        tell: receives lines of progress.

    Raises:
        InputError: so many cannot be removed.
    """
    groups = find_groups(state.build_empty())
    unet: UNet2DConditionModel = state.build().to(device)
    tell(
        f"importance of {sum(group.units for group in groups)} units in {len(groups)} groups, by {settings.importance}"
    )
    scores = score(unet, groups, probe, importance=settings.importance, rows=settings.batch, seed=seed)
    curves: dict[str, Curve] = {}
    if settings.budgets == "uniform":
        steps = uniform_steps(groups, multiple=settings.multiple)
    else:
        assert probe is not None
        curves = measure_curves(unet, groups, scores, probe, multiple=settings.multiple, rows=settings.batch, tell=tell)
        steps = steps_of_curves(groups, curves, multiple=settings.multiple)
    kept_units = allocate(steps, state.parameters - goal)
    kept = {name: best_units(scores[name], units) for name, units in kept_units.items()}
    pruned = prune(state, groups, kept)
    tell(f"{pruned.parameters:,} of {state.parameters:,} parameters stay")
    return Pruned(pruned, groups, kept_units, curves, choose_elastic(groups, scores, kept_units, elastic))


def channels_by_kind(rounds: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """For each kind of group, channels before the first round and after the last, as `Pruned.to_json` has them."""
    first, last = rounds[0]["groups"], rounds[-1]["groups"]
    return {
        kind: (
            int(np.sum([group["channels"] for group in first if group["kind"] == kind])),
            int(np.sum([group["kept"] for group in last if group["kind"] == kind])),
        )
        for kind in KINDS
    }
