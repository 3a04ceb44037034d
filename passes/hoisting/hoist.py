"""hoist: what depends only on the prompt or only on the timestep leaves the UNet for two small graphs.

A sampler calls the UNet at every step; the prompt stays the same over all of them, and a timestep is the same for all
pictures. With f the rest of the network,

    f(x, K_1(c) … K_n(c), t_1(s) … t_m(s))  =  unet(x, s, c)

K_i are the last values that depend on the prompt c alone (keys and values of cross-attention), t_j those that depend on
the timestep s alone (the embedding's projection of every residual block): K is computed once for a picture, t once for
each timestep of a schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from sdc.passes.base import PassReport, Skipped
from sdc.passes.hoisting.hoist_cut import PROMPT, TIMESTEP, choose_cut
from sdc.passes.hoisting.hoist_split import split_graph

__all__ = ["PROMPT", "TIMESTEP", "Hoisted", "hoist"]


@dataclass(frozen=True)
class Hoisted:
    """What left a UNet.

    Attributes:
        parts: graphs by input, ``PROMPT`` and ``TIMESTEP``; one that nothing leaves for is missing.
        report: as of a pass; details per part are nodes, bytes of weights and the tensors that cross.
    """

    parts: Mapping[str, ir.Model]
    report: PassReport


def hoist(model: ir.Model) -> Hoisted:
    """Split a UNet into what remains, in place, and up to two graphs that run outside the denoising loop.

    Before → after::

        unet(sample, timestep, encoder_hidden_states)   →  unet(sample, prompt.0 …, timestep.0)
                                                           prompt(encoder_hidden_states) = prompt.0 …
                                                           timestep(timestep) = timestep.0

    1. Inputs are told apart by rank: a sequence (3 axes) is the prompt; fewer axes are the timestep and its conditions;
       anything else is the sample. A node may leave if its numbers depend on the inputs of one part only, and it can be
       computed from them. What only a tensor's shape depends on does not count.
    2. An Expand that repeats a timestep [1] for every row of the sample is left out, and all that follows is computed
       for one row, as long as no node mixes rows (`mixes_rows`); where a reader in the UNet does not broadcast, it gets
       an Expand of its own. A row per picture (`timestep_cond`) stays a row per picture.
    3. The cut is as late as possible. It moves back over nodes that only move values about if what crosses becomes
       smaller by that (an Expand, a Tile, several Slices), and over a Cast from float32.
    4. What crosses is float32 with a known shape. An inner float16 is cast on both sides, which changes no value.
    5. Some arithmetic must leave: nothing is cut for casts and layout changes alone. Constants stay with their readers;
       a small one that is read on both sides is in both graphs.
    6. What crosses from the timestep's part and differs in its channels only (axis 1) is joined along them, and split
       in the UNet: it is handed over at every step, where each tensor costs time of its own.

    Tensors that cross are called ``prompt.0``, ``timestep.0`` … in the order of the graph. An input that the UNet still
    reads stays its input; others go. An output of the UNet that could leave is computed outside and passed through.

    Not matched: what depends on both the prompt and the timestep; bodies of functions, each call is a whole; nodes with
    subgraphs. A UNet that nothing leaves is not changed: `parts` is empty and the report says why.

    Args:
        model: a UNet whose values have types and shapes, of any precision, fused or not.
    """
    nodes_before = len(model.graph)
    cut = choose_cut(model.graph)
    if not cut.lifted:
        reasons = cut.skipped or (Skipped("graph", "no arithmetic depends on the prompt or the timestep alone"),)
        return Hoisted({}, PassReport("hoist", 0, reasons, nodes_before, nodes_before))
    parts = split_graph(model, cut)
    details = {name: _figures(part) for name, part in parts.items()}
    report = PassReport("hoist", len(cut.lifted), cut.skipped, nodes_before, len(model.graph), details=details)
    return Hoisted(parts, report)


def _figures(part: ir.Model) -> dict[str, int]:
    weights = (value.const_value for value in part.graph.initializers.values())
    return {
        "nodes": len(part.graph),
        "weight_bytes": sum(weight.nbytes for weight in weights if weight is not None),
        "tensors": len(part.graph.outputs),
    }
