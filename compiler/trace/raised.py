"""What the passes make of any exporter's graph: sites found, and how far canonical and fused graph are from it."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from sdc.compiler.build.built import save_onnx
from sdc.compiler.trace.check import Arrays, example_feeds
from sdc.compiler.trace.run_graph import relative_difference, run_graph
from sdc.compiler.workshop.memory import PeakMemory
from sdc.engines.specs import ComponentSpec, DimensionRange
from sdc.passes.base import run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes

COUNTED = ("Attention", "GroupNormalization", "LayerNormalization", "Gelu", "QuickGelu", "Silu")
"""Operators of a canonical graph that do not depend on the exporter."""
NORM_WITH_SILU = ("GroupNormSilu", "AddGroupNormSilu", "ConcatGroupNormSilu", "GroupNormSiluAdd")


@dataclass(frozen=True)
class Raised:
    """One graph's way through the passes.

    Attributes:
        source_nodes: of the graph as it came; likewise `fused_nodes`.
        sites: how many of each of `COUNTED` the canonical graph holds.
        norms_with_silu: sites of GroupNorm and SiLU in the canonical graph, and how many of them are fused.
        fused_attention: fused operators that hold an attention with its heads' split and merge.
        canonical_difference: largest over all sizes and outputs of the difference to the source on ONNX Runtime
            without optimisations, relative to the output's largest value; likewise `fused_difference`.
        half: whether the source computes in float16.
        seconds: of all passes.
        peak_memory_bytes: of the process while they ran.
    """

    source_nodes: int
    fused_nodes: int
    sites: Mapping[str, int]
    norms_with_silu: tuple[int, int]
    fused_attention: int
    canonical_difference: float
    fused_difference: float
    half: bool
    seconds: float
    peak_memory_bytes: int


def raise_and_compare(path: Path, spec: ComponentSpec, sizes: Sequence[Mapping[str, int]], vocabulary: int) -> Raised:
    """Run the passes on the graph in `path`, which stays as it is.

    Args:
        path: with inputs and outputs of the names and order of `spec`; floating-point ones of any type, and a timestep
            with or without a dimension.
        spec: the interface.
        sizes: of every free dimension, one after the other.
        vocabulary: number of tokens.
    """
    feeds = [example_feeds(spec, each, vocabulary=vocabulary) for each in sizes]
    expected = run_graph(path, feeds)
    model = ir.load(path)
    source_nodes = len(model.graph)
    half = any(value.dtype == ir.DataType.FLOAT16 for value in model.graph.initializers.values())
    with tempfile.TemporaryDirectory(prefix="sdc-raised-") as folder, PeakMemory() as memory:
        begin = time.perf_counter()
        run_passes(canonical_passes(), model)
        seconds = time.perf_counter() - begin
        sites = Counter(node.op_type for node in model.graph)
        with_silu = sum(_is_norm_with_silu(node) for node in model.graph)
        canonical = _difference(model, Path(folder, "canonical.onnx"), feeds, expected)
        begin = time.perf_counter()
        run_passes(fusion_passes(), model)
        seconds += time.perf_counter() - begin
        fused = Counter(node.op_type for node in model.graph)
        difference = _difference(model, Path(folder, "fused.onnx"), feeds, expected)
    return Raised(
        source_nodes=source_nodes,
        fused_nodes=len(model.graph),
        sites={name: sites[name] for name in COUNTED},
        norms_with_silu=(sum(fused[name] for name in NORM_WITH_SILU), with_silu),
        fused_attention=fused["MultiHeadAttention"],
        canonical_difference=canonical,
        fused_difference=difference,
        half=half,
        seconds=seconds,
        peak_memory_bytes=memory.peak_bytes,
    )


def several_sizes(spec: ComponentSpec) -> tuple[dict[str, int], ...]:
    """Batches of 1 and 3; landscape and portrait; all small, for float32 networks run in seconds at these."""
    return (_sizes(spec, 3, height=2, width=1), _sizes(spec, 1, height=1, width=3))


def _sizes(spec: ComponentSpec, batch: int, *, height: int, width: int) -> dict[str, int]:
    def size(symbol: str, allowed: DimensionRange) -> int:
        if symbol == "B":
            return min(batch, allowed.maximum)
        return allowed.multiple * (height if symbol.startswith("H") else width)

    return {symbol: size(symbol, allowed) for symbol, allowed in spec.dimensions.items()}


def _is_norm_with_silu(node: ir.Node) -> bool:
    if node.op_type != "Silu" or node.inputs[0] is None:
        return False
    producer = node.inputs[0].producer()
    return producer is not None and producer.op_type == "GroupNormalization"


Outputs = list[Arrays]


def _difference(model: ir.Model, path: Path, feeds: Sequence[Arrays], expected: Outputs) -> float:
    """Write the model, run it, remove it."""
    save_onnx(model, path)
    found = run_graph(path, feeds)
    for file in path.parent.iterdir():
        file.unlink()
    return max(
        relative_difference(new, old)
        for news, olds in zip(found, expected, strict=True)
        for new, old in zip(news.values(), olds.values(), strict=True)
    )
