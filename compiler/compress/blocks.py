"""Students with fewer blocks: what diffusers' own configuration can say, so that the result loads there as it is.

Source: Kim et al., "BK-SDM", arXiv:2305.15798, section 3.1. *Base*: one pair of residual block and transformer in each
stage going down, the first; two of three going up, the first and the third. *Small*: no middle stage either. What stays
keeps its weights.
"""

from __future__ import annotations

from sdc.compiler.compress.prune import UnetState
from sdc.compiler.compress.settings import Student
from sdc.compiler.load.widths import WIDTHS
from sdc.engines.errors import InputError


def remove_blocks(state: UnetState, student: Student) -> UnetState:
    """The UNet of a student, with the weights of the blocks that it keeps.

    Raises:
        InputError: the UNet does not have two layers in each stage, or is pruned already.
    """
    if student == "same":
        return state
    layers = state.config.get("layers_per_block")
    if WIDTHS in state.config or layers != 2:
        found = "is pruned already" if WIDTHS in state.config else f"has layers_per_block {layers}"
        raise InputError(
            f"BK-SDM's students are of UNets with two layers a block; this one {found}",
            hint="leave --student out",
        )
    config = {**state.config, "layers_per_block": 1}
    if student == "small":
        config["mid_block_type"] = None
    renamed = {_name_in_student(name, student): tensor for name, tensor in state.weights.items()}
    return UnetState(config, {name: tensor for name, tensor in renamed.items() if name is not None})


def _name_in_student(name: str, student: Student) -> str | None:
    """The name that a weight gets; None if it goes."""
    stage, *rest = name.split(".")
    if stage == "mid_block":
        return None if student == "small" else name
    if stage not in ("down_blocks", "up_blocks") or rest[1] not in ("resnets", "attentions"):
        return name
    kept = {"0": "0"} if stage == "down_blocks" else {"0": "0", "2": "1"}
    number = kept.get(rest[2])
    return None if number is None else ".".join([stage, rest[0], rest[1], number, *rest[3:]])
