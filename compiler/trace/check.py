"""Compares an exported graph with what torch makes of the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from sdc.engines.errors import ExportError
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec

SEED = 7411
RELATIVE_TOLERANCE = 1e-4
"""Largest difference to torch, relative to the largest output value. Both sides compute in float32: a layer that sums
10,000 products is off by about 1e-6, and a hundred such layers stay well below this bound, while a wrong operator,
constant or weight does not."""

Arrays = dict[str, np.ndarray]


def example_feeds(spec: ComponentSpec, sizes: Mapping[str, int], *, vocabulary: int) -> Arrays:
    """Seeded inputs of a component.

    Args:
        spec: the interface.
        sizes: of every free dimension.
        vocabulary: number of tokens; the last one ends a text and stands at another place in every row.
    """
    random = np.random.default_rng(SEED)

    def draw(tensor: TensorSpec) -> np.ndarray:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
        if tensor.dtype == "int64":
            tokens = random.integers(0, vocabulary - 1, shape)
            for row, ids in enumerate(tokens):
                ids[5 * row + 3 :] = vocabulary - 1
            return tokens
        if tensor.name == "timestep":
            return np.full(shape, 501.0, np.float32)
        return random.standard_normal(shape, dtype=np.float32)

    return {tensor.name: draw(tensor) for tensor in spec.inputs}


def small_sizes(spec: ComponentSpec) -> dict[str, int]:
    """Sizes for comparing: as small as the network can take, all different, and not those of the tracing."""

    def small(symbol: str, size: DimensionRange) -> int:
        if symbol == "B":
            return min(3, size.maximum)
        return size.multiple * (2 if symbol.startswith("H") else 1)

    return {symbol: small(symbol, size) for symbol, size in spec.dimensions.items()}


def run_module(module: nn.Module, spec: ComponentSpec, feeds: Arrays) -> Arrays:
    """What a torch module makes of the feeds, by the names of the interface.

    Raises:
        ExportError: it gives NaN or infinity.
    """
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(feeds[tensor.name]) for tensor in spec.inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = {tensor.name: output.numpy().copy() for tensor, output in zip(spec.outputs, outputs, strict=True)}
    for name, value in expected.items():
        if not np.isfinite(value).all():
            raise ExportError(
                f"the {spec.name} itself gives NaN or infinity in {name}, in float32 and before any compilation",
                hint="its weights are damaged, or a LoRA is too strong",
            )
    return expected


def compare_with_reference(path: Path, spec: ComponentSpec, feeds: Arrays, expected: Arrays) -> float:
    """Run an exported graph on ONNX Runtime, without its optimisations, and compare it with what torch gave.

    Returns:
        The largest difference, relative to the largest expected value of the same output.

    Raises:
        ExportError: it is above `RELATIVE_TOLERANCE`, or the graph cannot be run.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")  # no second copy of the weights
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        outputs = session.run([tensor.name for tensor in spec.outputs], feeds)
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise ExportError(f"ONNX Runtime cannot run the exported {spec.name}: {error}") from error
    worst = 0.0
    for tensor, found in zip(spec.outputs, outputs, strict=True):
        reference = expected[tensor.name]
        if found.shape != reference.shape:
            raise ExportError(f"the exported {spec.name} gives {tensor.name} {found.shape}, torch {reference.shape}")
        difference = float(np.abs(found - reference).max() / np.abs(reference).max())
        if not difference <= RELATIVE_TOLERANCE:
            raise ExportError(
                f"the exported {spec.name} differs from its torch module: {tensor.name} by {difference:.1e} of its "
                f"largest value, expected at most {RELATIVE_TOLERANCE:.0e}",
                hint="this is a fault of the export; please report it with the versions of torch and onnxscript",
            )
        worst = max(worst, difference)
    return worst
