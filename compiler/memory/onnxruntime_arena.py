"""ONNX Runtime's arena on the CPU, replayed: how much of it the activations of a graph touch.

Source: onnxruntime/core/framework/bfc_arena.cc, with the settings of `sdc.engines.sessions.onnxruntime_regions`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from sdc.engines.sessions.onnxruntime_regions import TABLE_SHARE, Regions
from sdc.passes.memory.buffers import SizedGraph
from sdc.passes.memory.lifetimes import lifetimes_of

_ALIGNMENT = 256


@dataclass
class _Chunk:
    """A piece of a region."""

    offset: int
    bytes: int
    free: bool = True


@dataclass
class _Region:
    """Memory that was asked for at once.

    Attributes:
        chunks: side by side, in the order of their places.
        table_bytes: where it is noted which chunk begins where.
        touched_bytes: up to where it was ever used.
    """

    chunks: list[_Chunk]
    table_bytes: int
    touched_bytes: int = 0


class _Arena:
    """Best fit in regions."""

    def __init__(self, settings: Regions) -> None:
        self.regions: list[_Region] = []
        self._settings = settings
        self._growth_bytes = settings.first_bytes
        if settings.kept_bytes:
            self._extend_by(settings.kept_bytes)

    def allocate(self, count: int) -> tuple[_Region, _Chunk]:
        """The smallest free chunk that is large enough; a new region if there is none."""
        count = -(-max(count, 1) // _ALIGNMENT) * _ALIGNMENT
        fitting = [
            (chunk.bytes, number, chunk.offset, region, chunk)
            for number, region in enumerate(self.regions)
            for chunk in region.chunks
            if chunk.free and chunk.bytes >= count
        ]
        if not fitting:
            self._extend(count)
            return self.allocate(count)
        *_, region, chunk = min(fitting, key=lambda each: each[:3])
        if chunk.bytes >= 2 * count or chunk.bytes - count >= self._settings.most_dead_bytes:
            rest = _Chunk(chunk.offset + count, chunk.bytes - count)
            region.chunks.insert(region.chunks.index(chunk) + 1, rest)
            chunk.bytes = count
        chunk.free = False
        region.touched_bytes = max(region.touched_bytes, chunk.offset + count)
        return region, chunk

    def release(self, region: _Region, chunk: _Chunk) -> None:
        """Free a chunk and join it with free neighbours."""
        chunk.free = True
        joined: list[_Chunk] = []
        for each in region.chunks:
            if joined and joined[-1].free and each.free:
                joined[-1].bytes += each.bytes
            else:
                joined.append(each)
        region.chunks = joined

    def _extend(self, count: int) -> None:
        grows = self._growth_bytes < count
        while self._growth_bytes < count:
            self._growth_bytes *= 2
        self._extend_by(self._growth_bytes)
        if not grows:
            self._growth_bytes = min(2 * self._growth_bytes, self._settings.most_bytes)

    def _extend_by(self, count: int) -> None:
        self.regions.append(_Region([_Chunk(0, count)], int(TABLE_SHARE * count)))


def touched_bytes(graph: SizedGraph, settings: Regions) -> int:
    """Of the arena after one run in the graph's order, tables too; what is not touched is not resident.

    Every buffer is allocated when a step writes it and released after the last that needs it, as it is without reuse of
    memory for equal shapes (``enable_mem_reuse``) and without a plan (``enable_mem_pattern``). The arena is new: what
    loading left in it is not known.
    """
    arena = _Arena(settings)
    begin, end = defaultdict(list), defaultdict(list)
    for number, life in enumerate(lifetimes_of(graph)):
        begin[life.begin].append((number, life.bytes))
        end[life.end].append(number)
    held: dict[int, tuple[_Region, _Chunk]] = {}
    for step in range(len(graph.steps)):
        for number, count in begin[step]:
            held[number] = arena.allocate(count)
        for number in end[step]:
            arena.release(*held.pop(number))
    return sum(region.touched_bytes + region.table_bytes for region in arena.regions)
