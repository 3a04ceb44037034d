"""Hoisting, broken in the ways in which it could have been, fails the proof that it passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
from broken import Broken, patched
from test_hoist import feed_unet, hoist_proven, vary

from sdc.passes.hoisting.crossing import Packet
from sdc.passes.hoisting.hoist_cut import PROMPT, TIMESTEP

FEEDS = [feed_unet(), feed_unet(batch=1, height=4), feed_unet(batch=5)]

PartOfInput = Callable[[ir.Value], str | None]


def make_unet() -> ir.Model:
    """Two values of one shape cross from the timestep's part, as one tensor."""
    return vary(
        (
            "second = Add (first, shift)",
            "waves = Sin (time)\n    gain = Unsqueeze (waves, planes)\n    shifted = Add (first, shift)\n"
            "    second = Mul (shifted, gain)",
        )
    )


def make_prompted() -> ir.Model:
    """Two tensors of one shape cross from the prompt's part."""
    return vary(
        (
            "out_sample = Add (second, bias)",
            "gist = Tanh (projected)\n    gain = Unsqueeze (gist, planes)\n    third = Add (second, bias)\n"
            "    out_sample = Mul (third, gain)",
        ),
        ("    extra = Tanh (key)\n    projected = MatMul (extra, w_extra)", "    projected = MatMul (key, w_extra)"),
        (", float[B, 5] extra)", ")"),
    )


def make_mixing() -> ir.Model:
    """A node mixes the rows that a timestep is repeated for."""
    return vary(("embedded = Add (sines, guided)", "mixed = Softmax <axis = 0> (sines)\n    embedded = Sin (mixed)"))


def outputs_swapped(extract: Callable[..., ir.Model]) -> Callable[..., ir.Model]:
    """A part gives its first and its last result under each other's name."""

    def exchanged(*args: Any) -> ir.Model:
        part = extract(*args)
        first, last = part.graph.outputs[0], part.graph.outputs[-1]
        if first.shape == last.shape:
            first.name, last.name = last.name, first.name
        return part

    return exchanged


def joined_backwards(packet: type[Packet]) -> type[Packet]:
    """Values of one packet are joined in another order than they are split in."""

    class Backwards(packet):
        def join(self, graph: ir.Graph, values: list[ir.Value]) -> ir.Value:
            return super().join(graph, values[::-1])

    return Backwards


def joined(part: str) -> Callable[[PartOfInput], PartOfInput]:
    """What depends on the prompt and what depends on the timestep leave together."""
    return lambda part_of_input: lambda value: None if part_of_input(value) is None else part


KINDS: dict[str, tuple[Callable[[], ir.Model], Broken]] = {
    "values in one tensor swapped": (make_unet, patched("hoisting.crossing:Packet", joined_backwards)),
    "crossing tensors swapped": (make_prompted, patched("hoisting.hoist_split:_extract", outputs_swapped)),
    "timestep in the prompt's part": (make_unet, patched("hoisting.hoist_cut:_part_of_input", joined(PROMPT))),
    "prompt in the timestep's part": (make_unet, patched("hoisting.hoist_cut:_part_of_input", joined(TIMESTEP))),
    "sample in the timestep's part": (
        make_unet,
        patched("hoisting.hoist_cut:_part_of_input", lambda _: lambda _: TIMESTEP),
    ),
    "rows mixed": (make_mixing, patched("hoisting.hoist_cut:mixes_rows", lambda _: lambda *_: None)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_broken_hoisting_is_noticed(kind: str) -> None:
    make, broken = KINDS[kind]
    assert hoist_proven(make(), FEEDS).parts
    with broken.patch(), pytest.raises(AssertionError, match="not equal"):
        hoist_proven(make(), FEEDS, tolerance=1e-4)
