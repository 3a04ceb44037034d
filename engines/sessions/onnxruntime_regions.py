"""How ONNX Runtime's arenas on the CPU grow: what its sessions ask for, and what `sdc plan` replays.

An arena is best fit in regions; of each, the system gives what is touched, and a table beside takes 1/32 of its size.
Left alone, each session has an arena that keeps what it ever took, in regions of 1 GiB at most: an image of 0.6 GiB
shares none with a second one. Large engines share one arena, with regions of 2 GiB.

Source: onnxruntime/core/framework/bfc_arena.cc, the comments of OrtArenaCfg in onnxruntime_c_api.h.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALL_ENGINE_BYTES = 32 << 20
"""Files of engines with arenas of their own: the shared one's first table alone has twice as much."""

TABLE_SHARE = 1 / 32
"""Of a region: bytes of a table with an entry of 8 for each 256."""


@dataclass(frozen=True)
class Regions:
    """How an arena grows.

    Attributes:
        kept_bytes: of a region that is there from the start, and stays.
        first_bytes: of the first that is made when one is needed; each one behind it is twice as large,
        most_bytes: up to this, or to the double of ``first_bytes`` that holds what is asked for.
        most_dead_bytes: a piece is split if it is twice as large as what is asked for, or if more than this would lie
            idle.
    """

    kept_bytes: int
    first_bytes: int
    most_bytes: int
    most_dead_bytes: int


OWN = Regions(0, 1 << 20, 1 << 30, 128 << 20)
"""What ONNX Runtime has unless it is told otherwise."""

_LARGEST_INT = (1 << 31) - 256
"""That the settings take, of whole pieces of memory."""
SHARED = Regions(1 << 20, _LARGEST_INT, _LARGEST_INT, 1 << 20)
"""Of the arena of a process. With so few regions, what lies idle costs more than pieces do."""


def regions_of(file_bytes: int) -> Regions:
    """Those of an engine whose files have so many bytes."""
    return OWN if file_bytes < SMALL_ENGINE_BYTES else SHARED
