"""Cuts into pieces, broken in the ways in which they could have been, fail the proof that they pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir
import pytest
from broken import Broken, patched
from test_broken_deepcache import constant_features, given_before_the_layers
from test_deepcache_cut import feed_unet
from test_shard_cut import make_sized, shard_proven

from sdc.passes.sharding.waists import Line


def first_nodes_left_out(choose_cuts: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """The first piece begins late."""
    return lambda *arguments: [1, *choose_cuts(*arguments)[1:]]


def last_reader_overlooked(line_up: Callable[[ir.Graph], Line]) -> Callable[[ir.Graph], Line]:
    """What several nodes read is taken to be dead before the last of them."""

    def overlooked(graph: ir.Graph) -> Line:
        line = line_up(graph)
        return replace(line, readers={value: its[:-1] or its for value, its in line.readers.items()})

    return overlooked


def sizes_confused(same_size: Callable[..., bool]) -> Callable[..., bool]:
    """Every size is taken to be that of an input."""
    return lambda *_: True


SIZE_OF_MIDDLE = (
    ("out_sample = Conv (last_join, w_out)", "plain = Conv (last_join, w_out)\n"
     "    rows = Shape <start = 2, end = 3> (middle)\n    tall = Cast <to = 1> (rows)\n"
     "    out_sample = Add (plain, tall)"),
)  # fmt: skip

KINDS: dict[str, tuple[tuple[tuple[str, str], ...], Broken]] = {
    "first nodes left out": ((), patched("sharding.shard:choose_cuts", first_nodes_left_out)),
    "other values given out": ((), patched("sharding.shard:give_out", given_before_the_layers)),
    "values not used": ((), patched("sharding.shard:take_in", constant_features)),
    "a reader overlooked": ((), patched("sharding.shard:line_up", last_reader_overlooked)),
    "another size read": (SIZE_OF_MIDDLE, patched("hoisting.crossing:same_size", sizes_confused)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_cut_is_noticed(kind: str) -> None:
    replacements, broken = KINDS[kind]
    shard_proven(make_sized(*replacements), 3, [feed_unet()])
    with broken.patch(), pytest.raises(AssertionError, match="not equal"):
        shard_proven(make_sized(*replacements), 3, [feed_unet()], tolerance=1e-4)
