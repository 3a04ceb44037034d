"""Weights that are mapped from a file."""

from __future__ import annotations

from contextlib import suppress

import onnx_ir as ir


def release(tensor: ir.TensorProtocol) -> None:
    """Give back the pages of a weight that is mapped from a file; they are mapped again when it is next read."""
    if isinstance(tensor, ir.ExternalTensor):
        with suppress(BufferError):  # somebody else is reading it
            tensor.release()


def release_weights(model: ir.Model) -> None:
    """Likewise, of all weights of the main graph."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            release(value.const_value)
