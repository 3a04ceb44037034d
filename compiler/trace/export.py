"""Torch modules to graphs: each component is exported by torch's dynamo exporter and compared with its module."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.onnx import OnnxExporterError

from sdc.compiler.build.built import save_onnx
from sdc.compiler.load import Checkpoint
from sdc.compiler.load.networks import network_of
from sdc.compiler.trace.check import Arrays, compare_with_reference, example_feeds, run_module, small_sizes
from sdc.compiler.trace.interfaces import component_spec
from sdc.compiler.trace.tidy import tidy_export
from sdc.compiler.trace.traceable import traceable_module
from sdc.engines.errors import ExportError
from sdc.engines.freed_memory import give_memory_back
from sdc.engines.specs import ComponentSpec, DimensionRange
from sdc.passes.simplify.factorise_weights import LOW_RANK

log = logging.getLogger(__name__)

OPSET = 23
"""The first opset with `Attention`; the exporter also keeps `GroupNormalization` and `Gelu` whole."""


def export_component(checkpoint: Checkpoint, name: str, configs: Mapping[str, Mapping[str, Any]], path: Path) -> float:
    """Export one component and compare the graph with its torch module, which is freed before.

    Args:
        checkpoint: gives the module.
        name: one of ``COMPONENTS``.
        configs: full configurations of all networks: see `component_spec`.
        path: of the graph; its weights go beside it, into ``<name>_data``.

    Returns:
        The largest difference to the module, relative to its largest output value.

    Raises:
        ExportError: the module cannot be exported, or the graph computes something else than the module.
    """
    spec = component_spec(name, configs)
    vocabulary = int(configs["text_encoder"]["vocab_size"])
    low_rank = bool(checkpoint.config(network_of(name)).get(LOW_RANK))
    feeds, expected = _export_module(
        traceable_module(checkpoint, name), spec, path, vocabulary=vocabulary, low_rank=low_rank
    )
    gc.collect()  # the exported program refers to itself, and with it to all weights
    give_memory_back()
    difference = compare_with_reference(path, spec, feeds, expected)
    log.info("%s: largest difference to torch %.1e", name, difference)
    return difference


def _export_module(
    module: nn.Module, spec: ComponentSpec, path: Path, *, vocabulary: int, low_rank: bool
) -> tuple[Arrays, Arrays]:
    """Write the graph of `module`; returns feeds and what the module makes of them."""
    feeds = example_feeds(spec, small_sizes(spec), vocabulary=vocabulary)
    expected = run_module(module, spec, feeds)
    traced = example_feeds(spec, _tracing_sizes(spec), vocabulary=vocabulary)
    sizes = {symbol: _torch_dimension(symbol, size) for symbol, size in spec.dimensions.items()}
    try:
        program = torch.onnx.export(
            module,
            tuple(torch.from_numpy(traced[tensor.name]) for tensor in spec.inputs),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=tuple(
                {axis: sizes[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
                for tensor in spec.inputs
            ),
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            verbose=False,
        )
    except OnnxExporterError as error:
        raise ExportError(f"torch could not export the {spec.name}: {error}") from error
    assert program is not None
    model = tidy_export(program, spec)
    if low_rank:
        model.metadata_props[LOW_RANK] = "true"
    save_onnx(model, path)
    for value in model.graph.initializers.values():
        value.const_value = None  # the exporter's own tables keep the graph alive, and with it the weights
    return feeds, expected


def _tracing_sizes(spec: ComponentSpec) -> dict[str, int]:
    """Sizes for tracing, which computes nothing: the largest, height and width apart."""

    def large(symbol: str, size: DimensionRange) -> int:
        return size.maximum - (size.multiple if symbol.startswith("H") else 0)

    return {symbol: large(symbol, size) for symbol, size in spec.dimensions.items()}


def _torch_dimension(symbol: str, size: DimensionRange) -> Dim:
    """The free dimension as torch wants it said: a whole number of times its divisor, where it has one."""
    dimension = Dim(f"{symbol}_count", min=1, max=size.maximum // size.multiple)
    return dimension if size.multiple == 1 else size.multiple * dimension
