"""What ONNX Runtime's CPU provider holds of an engine, from the engine's file alone."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from sdc.compiler.memory.openvino_engines import HeldEngine
from sdc.engines.errors import BundleError

GRAPH_BYTES_PER_NODE = 33_000
"""What stays of a node beside its constants and activations.

Source: resident memory after loading, less constants, of SD 1.5's UNet in int8 (1,389 nodes, 32 kB each), VAE decoder
(167, 48), text encoder (327, 18) and unet_prompt (66, 41); ONNX Runtime 1.31.
"""

_FLOAT32_BYTES = 4
_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_ROWS = frozenset({"Gather"})
"""Operators that read a few rows of a constant, in the mapped file."""


def read_onnx_engine(path: Path) -> HeldEngine:
    """What an engine takes once it is loaded, as `sdc.engines.sessions.onnxruntime` loads it.

    1. The CPU has no kernels for 16-bit floats: such constants are cast to float32, and only that stays.
    2. Other constants take what they take in the file, packed for a kernel or not. Their originals are freed.
    3. While it is loaded, the 16-bit constants are in memory beside, and what is read by convolutions twice: as it was
       and blocked by channels.
    4. A table of which a Gather reads rows stays in the mapped file.

    Source: ONNX Runtime 1.31, by the sizes and callers of its live blocks after loading, its arena switched off.

    Args:
        path: of the .onnx file.

    Raises:
        BundleError: the file cannot be read.
    """
    try:
        graph = ir.load(path).graph
    except Exception as error:  # of protobuf, onnx and the system
        raise BundleError(f"{path} is no ONNX graph: {error}", hint="export the bundle again") from error
    weights = loading = 0
    for value in graph.initializers.values():
        tensor, readers = value.const_value, {node.op_type for node in value.consumers()}
        if tensor is None or readers <= _ROWS:
            continue
        expands = tensor.dtype in _HALVES
        held = _FLOAT32_BYTES * tensor.size if expands else tensor.nbytes
        weights += held
        if expands:
            loading += tensor.nbytes + (held if "Conv" in readers else 0)
    return HeldEngine(weights, GRAPH_BYTES_PER_NODE * len(graph), loading)
