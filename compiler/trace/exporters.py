"""Graphs as other tools export them: the test material of the passes that raise any exporter's graph."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim

from sdc.compiler.build.built import save_onnx
from sdc.compiler.load import Checkpoint
from sdc.compiler.trace.check import Arrays, example_feeds, small_sizes
from sdc.compiler.trace.traceable import traceable_module
from sdc.compiler.workshop.memory import PeakMemory
from sdc.engines.specs import ComponentSpec
from sdc.passes.base import run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes


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
    )
}
"""Ways that float32 graphs are made in."""

_COUNTED = ("Attention", "GroupNormalization", "LayerNormalization", "Gelu", "QuickGelu", "Silu")
_FUSED = ("MultiHeadAttention", "GroupNormSilu", "AddGroupNormSilu")


def export_checkpoint(exporter: Exporter, checkpoint: Checkpoint, spec: ComponentSpec, folder: Path) -> Path:
    """Write a checkpoint's network as `exporter` does; returns the graph's path."""
    folder.mkdir(parents=True, exist_ok=True)
    feeds = example_feeds(spec, small_sizes(spec), vocabulary=100)
    free = {
        tensor.name: {axis: size for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    }
    inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
    outputs = [tensor.name for tensor in spec.outputs]
    path = folder / "model.onnx"
    export_with(exporter, traceable_module(checkpoint, spec.name), inputs, outputs, path, free=free)
    return path


def raise_and_count(path: Path, spec: ComponentSpec) -> dict[str, str]:
    """Sites of a graph once it is canonical and once it is fused, with time, memory and the difference to the source.

    The fused graph is written beside the source, as ``fused.onnx``.
    """
    model = ir.load(path)
    begin = time.perf_counter()
    with PeakMemory() as memory:
        run_passes(canonical_passes(), model)
        canonical = Counter(node.op_type for node in model.graph)
        run_passes(fusion_passes(), model)
    seconds = time.perf_counter() - begin
    fused = Counter(node.op_type for node in model.graph)
    save_onnx(model, path.with_name("fused.onnx"))
    feeds = example_feeds(spec, small_sizes(spec), vocabulary=100)
    pairs = zip(_run(path, feeds), _run(path.with_name("fused.onnx"), feeds), strict=True)
    difference = max(float(np.abs(new - old).max() / np.abs(old).max()) for old, new in pairs)
    return {
        **{name: str(canonical[name]) for name in _COUNTED},
        **{name: str(fused[name]) for name in _FUSED},
        "nodes": str(len(model.graph)),
        "difference": f"{difference:.1e}",
        "seconds": f"{seconds:.1f}",
        "peak, MB": f"{memory.peak_bytes / 1e6:.0f}",
    }


def _run(path: Path, feeds: Arrays) -> list[np.ndarray]:
    """All outputs on ONNX Runtime, without its optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, feeds)
    return outputs
