"""Graphs as other tools export them: the test material of the passes that raise any exporter's graph."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim

from sdc.compiler.load import Checkpoint
from sdc.compiler.trace.check import example_feeds
from sdc.compiler.trace.traceable import CAUSAL_ATTENTION, DECOMPOSED_ATTENTION, traceable_module
from sdc.engines.specs import ComponentSpec, DimensionRange


@dataclass(frozen=True)
class Exporter:
    """A way to make a graph.

    Attributes:
        kind: "torchscript" traces the module and writes its operators one by one, with sizes computed in the graph;
            "dynamo" is torch's present exporter.
        opset: ONNX's version.
        dtype: element type of the weights and of the floating-point inputs.
    """

    kind: Literal["torchscript", "dynamo"]
    opset: int
    dtype: torch.dtype = torch.float32

    @property
    def label(self) -> str:
        """As tables print it, ``torchscript-17`` or ``dynamo-18-fp16``."""
        return f"{self.kind}-{self.opset}" + ("-fp16" if self.dtype == torch.float16 else "")


def export_with(
    exporter: Exporter,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: list[str],
    path: Path,
    *,
    free: Mapping[str, Mapping[int, str]],
) -> None:
    """Write the graph of `module` to `path`; large weights go beside it.

    Args:
        exporter: the way.
        module: takes the inputs in order; it is converted to the exporter's element type.
        inputs: example inputs by name, floating-point ones in any type.
        outputs: names of the graph's outputs.
        path: of the graph.
        free: per input, the axes whose sizes stay free and their symbols.
    """
    module.to(exporter.dtype)
    arguments = tuple(value.to(exporter.dtype) if value.is_floating_point() else value for value in inputs.values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the TorchScript exporter is deprecated, and says so at every size it traces
        if exporter.kind == "torchscript":
            torch.onnx.export(
                module,
                arguments,
                str(path),  # of another type, large weights would not be put beside it
                dynamo=False,
                opset_version=exporter.opset,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_axes={name: dict(axes) for name, axes in free.items()},
            )
            return
        torch.onnx.export(
            module,
            arguments,
            path,
            dynamo=True,
            opset_version=exporter.opset,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=tuple(dict.fromkeys(free.get(name, {}), Dim.DYNAMIC) for name in inputs),
            external_data=True,
            verbose=False,
        )


EXPORTERS = {
    each.label: each
    for each in (
        Exporter("torchscript", 14),
        Exporter("torchscript", 17),
        Exporter("dynamo", 18),
        Exporter("dynamo", 23),
        Exporter("torchscript", 17, torch.float16),
        Exporter("dynamo", 18, torch.float16),
        Exporter("dynamo", 23, torch.float16),
    )
}
"""Ways that graphs are made in."""


def export_checkpoint(exporter: Exporter, checkpoint: Checkpoint, spec: ComponentSpec, folder: Path) -> Path:
    """Write a checkpoint's network as `exporter` does; returns the graph's path.

    In float16, the TorchScript exporter writes a causal `scaled_dot_product_attention` with a float32 mask and no cast
    back, which is no valid graph; a text encoder is written from its attention in single operators instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {symbol: _traced_size(symbol, allowed) for symbol, allowed in spec.dimensions.items()}
    feeds = example_feeds(spec, sizes, vocabulary=100)
    free = {
        tensor.name: {axis: size for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    }
    inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
    outputs = [tensor.name for tensor in spec.outputs]
    path = folder / "model.onnx"
    mixes_types = exporter.kind == "torchscript" and exporter.dtype == torch.float16
    attention = DECOMPOSED_ATTENTION if mixes_types else CAUSAL_ATTENTION
    module = traceable_module(checkpoint, spec.name, text_attention=attention)
    export_with(exporter, module, inputs, outputs, path, free=free)
    return path


def _traced_size(symbol: str, allowed: DimensionRange) -> int:
    """Small, all different, and more than 1 at every level: dynamo takes a size of 1 for fixed."""
    if symbol == "B":
        return min(2, allowed.maximum)
    return allowed.multiple * (2 if symbol.startswith("H") else 3)
