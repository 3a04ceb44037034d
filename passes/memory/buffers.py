"""A graph reduced to what memory depends on: buffers, and the steps that write and read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from sdc.engines.errors import InputError
from sdc.passes.shapes.sizes import Size, symbols

ALIGNMENT = 64
"""Bytes to whose multiple every buffer is rounded up: a cache line of x86 and most ARM processors."""


@dataclass(frozen=True)
class Buffer:
    """Memory that a tensor and all views of it live in.

    Attributes:
        name: of the tensor that is written into it.
        elements: how many it holds, e.g. ``320*B*H*W``.
        dtype: their type.
    """

    name: str
    elements: Size
    dtype: ir.DataType

    def bytes_at(self, sizes: Mapping[str, int], *, floating_bits: int | None = None) -> int:
        """Its bytes for given sizes, not rounded.

        Args:
            sizes: a size for every symbol.
            floating_bits: of the type in which the backend keeps floating-point tensors; None for the graph's own.

        Raises:
            InputError: a symbol has no size.
        """
        count = self.elements if isinstance(self.elements, int) else self.elements.evaluate(sizes)
        if not isinstance(count, int):
            missing = sorted(symbols(count) - set(sizes))
            raise InputError(f"no size for {missing} of {self.name!r}", hint="give a size for every symbol")
        bits = self.dtype.bitwidth if floating_bits is None or not self.dtype.is_floating_point() else floating_bits
        return -(-count * bits // 8)


@dataclass(frozen=True)
class Step:
    """One node.

    Attributes:
        operator: what it computes.
        reads: indices of buffers whose contents it needs; likewise ``writes``.
        overwrites: those of ``reads`` in whose place an element-wise operator can leave its result.
    """

    operator: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    overwrites: tuple[int, ...] = ()


@dataclass(frozen=True)
class BufferGraph:
    """A graph with free sizes; `buffers_from_graph` makes it.

    Attributes:
        inputs: buffers of the graph's inputs, which belong to the caller; no step's indices mean them.
        buffers: all that the engine itself needs memory for.
        steps: in the order of the graph.
        outputs: indices of the buffers that hold the graph's outputs.
        weight_bytes: of all constants as they are stored.
    """

    inputs: tuple[Buffer, ...]
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    weight_bytes: int

    def at(self, sizes: Mapping[str, int], *, floating_bits: int | None = None) -> SizedGraph:
        """The graph for given sizes; the arguments are those of `Buffer.bytes_at`.

        Raises:
            InputError: a symbol has no size.
        """
        return SizedGraph(
            names=tuple(buffer.name for buffer in self.buffers),
            bytes=tuple(_aligned(buffer.bytes_at(sizes, floating_bits=floating_bits)) for buffer in self.buffers),
            steps=self.steps,
            outputs=frozenset(self.outputs),
            input_bytes=sum(buffer.bytes_at(sizes) for buffer in self.inputs),
        )


@dataclass(frozen=True)
class SizedGraph:
    """A graph with given sizes.

    Attributes:
        names: of the buffers; likewise ``bytes``, in multiples of `ALIGNMENT`.
        steps: in the order in which they run.
        outputs: buffers that are held to the end.
        input_bytes: of all inputs together.
    """

    names: tuple[str, ...]
    bytes: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: frozenset[int]
    input_bytes: int = 0


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
