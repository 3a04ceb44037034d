"""Elastic channels: units that a smaller network would do without, which stay in it switched off.

A unit is off where the layer that reads it has zeros for its channels. So the graph is that of the network with all of
them on, and switching one on is another weight of one layer. In recovery every `OPEN_TURN`-th step is taken with all
units on, so that the network learns to use them too.

Their weights are in a file of their own beside the networks. Switched on, they are a LoRA: what picks their channels
goes down, their weights go up. Added to zeros that gives the very weights, and a bundle takes it, and gives it back, as
it does any LoRA.

Source of training a network at several widths: Yu et al., "Slimmable Neural Networks", arXiv:1812.08928.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from sdc.compiler.compress.channels import ChannelGroup
from sdc.compiler.compress.gates import Units, channels_of
from sdc.compiler.compress.importance import Scores, best_units
from sdc.compiler.compress.prune import UnetState
from sdc.compiler.load.tensor_files import read_metadata, read_tensors
from sdc.engines.errors import InputError

ELASTIC_FILE = "elastic.safetensors"
"""In a folder that `sdc compress --elastic` wrote."""

OPEN_TURN = 3
"""One step of recovery in so many is taken with all units on."""

_METADATA = "sdc.elastic"


def choose_elastic(
    groups: Sequence[ChannelGroup], scores: Scores, kept_units: Mapping[str, int], share: float
) -> dict[str, list[list[int]]]:
    """The least important of the units that a round keeps, in groups that lose units; channels as they are after it.

    Args:
        groups: of the network before the round.
        scores: of their units.
        kept_units: of the groups that lose any.
        share: of a group's units before the round, and one at least; one unit at least stays on.
    """
    off = {}
    for group in groups:
        kept = kept_units.get(group.name, group.units)
        count = min(max(1, round(share * group.units)) if share else 0, kept - 1)
        if kept < group.units and count > 0:
            stay = best_units(scores[group.name], kept)
            places = np.flatnonzero(~np.isin(stay, best_units(scores[group.name], kept - count)))
            off[group.name] = [group.channels_of(place) for place in places.tolist()]
    return off


def close_units(state: UnetState, off: Units) -> UnetState:
    """The network with zeros for the units that are off; other tensors are shared."""
    closed = {
        f"{layer}.weight": state.weights[f"{layer}.weight"].index_fill(1, channels_of(units), 0)
        for layer, units in off.items()
    }
    return UnetState(state.config, {**state.weights, **closed})


@dataclass(frozen=True)
class ElasticChannels:
    """What a compressed folder keeps of its units that are off.

    Attributes:
        off: which they are.
        columns: for each layer that reads them, its weights for their channels, [outputs, channels, ...].
        teacher: what `load_checkpoint` takes: the model that was compressed.
        teacher_weights: "trained" or "random".
        teacher_digest: of its UNet.
        guidance_scale: at which pictures are compared.
        size: (C, H, W) of the latents that errors are of; likewise ``steps``, of each picture.
        errors: of the network as it was written, for some captions of its data, as `restore.prompt_errors` says; empty
            if it had none.
    """

    off: Units
    columns: Mapping[str, Tensor]
    teacher: str
    teacher_weights: str
    teacher_digest: str
    guidance_scale: float
    size: tuple[int, ...]
    steps: int
    errors: tuple[float, ...]

    @property
    def units(self) -> int:
        """How many are off."""
        return sum(map(len, self.off.values()))

    def save(self, folder: Path) -> None:
        """Write the file into a compressed folder."""
        described = {
            "off": {layer: [list(unit) for unit in units] for layer, units in self.off.items()},
            "teacher": self.teacher,
            "teacher_weights": self.teacher_weights,
            "teacher_digest": self.teacher_digest,
            "guidance_scale": self.guidance_scale,
            "size": list(self.size),
            "steps": self.steps,
            "errors": list(self.errors),
        }
        columns = {f"{layer}.weight": each.detach().cpu().contiguous() for layer, each in self.columns.items()}
        save_file(columns, folder / ELASTIC_FILE, metadata={_METADATA: json.dumps(described)})


def columns_of(state: UnetState, off: Units) -> dict[str, Tensor]:
    """The weights for units that are off, of a network in which they are on."""
    return {layer: state.weights[f"{layer}.weight"].index_select(1, channels_of(units)) for layer, units in off.items()}


def read_elastic(folder: Path) -> ElasticChannels:
    """What `ElasticChannels.save` wrote.

    Raises:
        InputError: the folder has no such file, or another program wrote it.
    """
    path = folder / ELASTIC_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} has no channels that are switched off: it has no {ELASTIC_FILE}",
            hint="make it with `sdc compress --elastic`",
        )
    tensors = read_tensors(path)
    try:
        described = json.loads(read_metadata(path)[_METADATA])
        columns = {layer: tensors[f"{layer}.weight"] for layer in described["off"]}
        return ElasticChannels(
            described["off"],
            columns,
            described["teacher"],
            described["teacher_weights"],
            described["teacher_digest"],
            float(described["guidance_scale"]),
            tuple(map(int, described["size"])),
            int(described["steps"]),
            tuple(map(float, described["errors"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} was not written by `sdc compress --elastic`: {error}") from error


def open_units(unet: UNet2DConditionModel, elastic: ElasticChannels) -> None:
    """Give a network that was loaded from the folder the weights of all its units that are off.

    Raises:
        InputError: the file belongs to another network: shapes differ, or weights of units that are off are not zero.
    """
    for layer, units in elastic.off.items():
        try:
            weight, channels = unet.get_parameter(f"{layer}.weight").detach(), channels_of(units)
            in_use = bool(weight.index_select(1, channels).any())
            opened = weight.index_copy(1, channels, elastic.columns[layer].to(weight))
        except (AttributeError, IndexError, RuntimeError) as error:
            raise InputError(f"{ELASTIC_FILE} does not fit the UNet beside it, at {layer}: {error}") from error
        if in_use:
            raise InputError(f"{ELASTIC_FILE} does not fit the UNet beside it: channels of {layer} are not off")
        unet.get_submodule(layer).weight = nn.Parameter(opened, requires_grad=False)


def lora_of_units(
    elastic: ElasticChannels, chosen: Mapping[str, Sequence[int]], unet: UNet2DConditionModel
) -> dict[str, Tensor]:
    """The LoRA that switches units on, in peft's names: the identity's rows down, in float16, and weights up.

    Args:
        elastic: has the weights.
        chosen: numbers of units among those of each layer that are off.
        unet: of the folder, for the shapes of its layers.
    """
    tensors = {}
    for layer, numbers in chosen.items():
        width, *window = unet.get_parameter(f"{layer}.weight").shape[1:]
        units = elastic.off[layer]
        first = np.cumsum([0, *map(len, units)])
        columns = [place for number in numbers for place in range(first[number], first[number + 1])]
        channels = channels_of([units[number] for number in numbers])
        up = elastic.columns[layer][:, columns].flatten(1)
        places = int(np.prod(window))
        down = torch.zeros(len(channels), places, width, places, dtype=torch.float16)
        for place in range(places):
            down[torch.arange(len(channels)), place, channels, place] = 1
        down = down.reshape(-1, width, *window)
        tensors[f"unet.{layer}.lora_A.weight"] = down
        tensors[f"unet.{layer}.lora_B.weight"] = up.reshape(*up.shape, *(1 for _ in window)).contiguous()
    return tensors
