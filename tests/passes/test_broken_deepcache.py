"""DeepCache's cut, broken in the ways in which it could have been, fails the proof that it passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest
from broken import Broken, patched
from test_deepcache_cut import make_unet, split_and_reuse

from sdc.passes.hoisting.deepcache import SkipConnection

Find = Callable[[ir.Graph], list[SkipConnection]]


def deep_and_skip_confused(find: Find) -> Find:
    return lambda graph: [replace(each, deep=each.skip, skip=each.deep) for each in find(graph)]


def counted_from_the_input(find: Find) -> Find:
    return lambda graph: find(graph)[::-1]


def last_connection_overlooked(find: Find) -> Find:
    return lambda graph: find(graph)[:-1]


def given_before_the_layers(give_out: Callable[..., ir.Value]) -> Callable[..., ir.Value]:
    """What the last layer before the join is given, which has another number of channels or other values."""

    def given(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
        node = ir.node("Tanh", [value])
        graph.append(node)
        node.outputs[0].shape, node.outputs[0].dtype = value.shape, value.dtype
        return give_out(graph, node.outputs[0], name)

    return given


def constant_features(take_in: Callable[..., ir.Value]) -> Callable[..., ir.Value]:
    """The deep features are taken and not used."""

    def taken(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, *, before: ir.Node) -> ir.Value:
        inside = take_in(graph, value, dtype, before=before)
        node = ir.node("Sub", [inside, inside])
        graph.insert_before(before, node)
        node.outputs[0].shape, node.outputs[0].dtype = value.shape, dtype
        return node.outputs[0]

    return taken


KINDS: dict[str, tuple[int, Broken]] = {
    "skip cached in place of the deep features": (
        0,
        patched("hoisting.deepcache:find_skip_connections", deep_and_skip_confused),
    ),
    "depth counted from the input": (0, patched("hoisting.deepcache:find_skip_connections", counted_from_the_input)),
    "one connection overlooked": (0, patched("hoisting.deepcache:find_skip_connections", last_connection_overlooked)),
    "other features given out": (1, patched("hoisting.deepcache:give_out", given_before_the_layers)),
    "features not used": (2, patched("hoisting.deepcache:take_in", constant_features)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_cut_is_noticed(kind: str) -> None:
    depth, broken = KINDS[kind]
    split_and_reuse(make_unet(), depth)
    notice: tuple[type[Exception], ...] = (AssertionError, InvalidArgument)
    with broken.patch(), pytest.raises(notice, match=r"not equal|Got invalid dimensions|step must matter"):
        split_and_reuse(make_unet(), depth)


def _invalid_argument() -> Any:
    from onnxruntime.capi import onnxruntime_pybind11_state

    return onnxruntime_pybind11_state.InvalidArgument


InvalidArgument = _invalid_argument()
