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

SESSION_BYTES = 2_500_000
"""What a session takes beside its nodes. Source: as above, SD 1.5's smallest engines, unet_timestep and unet_prompt."""

_FLOAT32_BYTES = 4
_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_ROWS = frozenset({"Gather"})
"""Operators that read a few rows of a constant, in the mapped file."""


def read_graph(path: Path) -> ir.Graph:
    """The graph of an engine; its constants stay in their file.

    Raises:
        BundleError: the file cannot be read.
    """
    try:
        return ir.load(path).graph
    except Exception as error:  # of protobuf, onnx and the system
        raise BundleError(f"{path} is no ONNX graph: {error}", hint="export the bundle again") from error


def held_by_onnxruntime(graph: ir.Graph) -> HeldEngine:
    """What an engine takes once it is loaded, as `sdc.engines.sessions.onnxruntime` loads it.

    1. Constants of 16-bit floats are cast to float32, by the graph or because the CPU has no kernels for them, and only
       that stays.
    2. Other constants take what they take in the file, packed for a kernel or not. Their originals are freed.
    3. While it is loaded, a constant of 16-bit floats is there three times: as it is stored, in float32, and packed.
       Those that convolutions read, blocked by channels, are so all at once, others one after the other.
    4. A table of which a Gather reads rows stays in the mapped file.

    Source: ONNX Runtime 1.31, by the sizes and callers of its live blocks after loading, its arena switched off.
    """
    weights = blocked = largest = 0
    for value in graph.initializers.values():
        tensor, readers = value.const_value, _readers(value)
        is_cast = any(node.op_type == "Cast" for node in value.consumers())
        if tensor is None or (readers <= _ROWS and not is_cast):
            continue
        expands = tensor.dtype in _HALVES
        held = _FLOAT32_BYTES * tensor.size if expands else tensor.nbytes
        weights += held
        if expands and "Conv" in readers:
            blocked += tensor.nbytes + held
        elif expands:
            largest = max(largest, tensor.nbytes + held)
    folded = sum(_is_cast_constant(node) for node in graph)
    return HeldEngine(weights, SESSION_BYTES + GRAPH_BYTES_PER_NODE * (len(graph) - folded), blocked + largest)


def _readers(value: ir.Value) -> set[str]:
    """Operators that read a constant, behind its casts, which are done when the engine is loaded."""
    read: set[str] = set()
    for node in value.consumers():
        read |= _readers(node.outputs[0]) if node.op_type == "Cast" else {node.op_type}
    return read


def _is_cast_constant(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].is_initializer()
