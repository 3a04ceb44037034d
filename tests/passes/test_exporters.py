"""Whatever exporter a graph came from, it reaches the same canonical graph and is fused at the same sites."""

from __future__ import annotations

from collections import Counter
from functools import cache

import onnx_ir as ir
import pytest
from equality import apply_proven
from exported_graphs import DYNAMO, FOREIGN, INPUTS, feed, load_graph

from sdc.passes.base import run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes

SIZES = [{}, {"batch": 1, "height": 4, "width": 20}]

CANONICAL = (
    *("Attention", "GroupNormalization", "LayerNormalization", "Gelu", "sdc.Silu", "sdc.QuickGelu", "Split"),
    *("Conv", "MatMul", "Gemm", "Resize", "Transpose", "Softmax", "InstanceNormalization", "Erf", "Sigmoid"),
)
"""Operators that every exporter's graph holds alike, once it is canonical; of the last four none."""

REDUCED = {
    "sd2_unet": {"Attention": 12, "GroupNormalization": 31, "LayerNormalization": 18, "Gelu": 6, "sdc.Silu": 27},
    "sdxl_unet": {"Attention": 36, "GroupNormalization": 31, "LayerNormalization": 54, "Gelu": 18, "sdc.Silu": 28},
}
"""Sites by the architecture: 6 transformer blocks of 1 or 3 layers with two attentions, three norms and a GELU each."""


def count(model: ir.Model) -> Counter[str]:
    return Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph)


@cache
def canonical_counts(exporter: str, component: str) -> dict[str, int]:
    model = load_graph(component, exporter=exporter)
    run_passes(canonical_passes(), model)
    counts = count(model)
    return {name: counts[name] for name in CANONICAL}


def fused_counts(exporter: str, component: str) -> dict[str, int]:
    model = load_graph(component, exporter=exporter)
    run_passes((*canonical_passes(), *fusion_passes()), model)
    return {name: number for name, number in count(model).items() if name.startswith("sdc.")}


@pytest.mark.parametrize(("exporter", "component"), FOREIGN)
def test_canonical_graph_holds_the_same_operators(exporter: str, component: str) -> None:
    found = canonical_counts(exporter, component)
    if component in INPUTS:
        assert found == canonical_counts(DYNAMO, component)
    else:
        assert found == canonical_counts("dynamo-18", component)
        assert {name: found[name] for name in REDUCED[component]} == REDUCED[component]
    assert not any(found[name] for name in CANONICAL[-4:])


@pytest.mark.parametrize(("exporter", "component"), FOREIGN)
def test_same_sites_are_fused(exporter: str, component: str) -> None:
    other = DYNAMO if component in INPUTS else "dynamo-18"
    assert fused_counts(exporter, component) == fused_counts(other, component)


@pytest.mark.parametrize(("exporter", "component"), FOREIGN)
def test_canonical_and_fused_graph_compute_the_same(exporter: str, component: str) -> None:
    model = load_graph(component, exporter=exporter)
    feeds = [feed(component, **size) for size in SIZES]
    reports = apply_proven((*canonical_passes(), *fusion_passes()), model, feeds)
    missed = [each for report in reports if report.name.startswith(("raise-", "fuse-")) for each in report.skipped]
    assert all("argument is not the other factor" in each.reason for each in missed), missed


@pytest.mark.parametrize(("exporter", "component"), FOREIGN)
def test_every_shape_is_known(exporter: str, component: str) -> None:
    model = load_graph(component, exporter=exporter)
    run_passes(canonical_passes(), model)
    free = {size.value for value in model.graph.inputs for size in value.shape or () if not isinstance(size, int)}
    for value in (value for node in model.graph for value in node.outputs):
        assert value.shape is not None
        assert value.dtype is not None
        sizes = [size for size in value.shape if not isinstance(size, int)]
        assert all(size.value is not None and size.free_symbols() <= free for size in sizes), value
