"""Where ONNX Runtime's sessions on the CPU have their activations: small engines in arenas of their own, others in one.

An arena is best fit in regions; of each, the system gives what is touched, and a table beside takes 1/32 of its size.
Left alone, each session has an arena that keeps what it ever took, in regions of 1 GiB at most: an image of 0.6 GiB
shares none with a second one. Large engines share one, with regions of 2 GiB, which are given back when engines are
closed.

Source: onnxruntime/core/framework/bfc_arena.cc, the comments of OrtArenaCfg in onnxruntime_c_api.h.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import onnxruntime

from sdc.engines.freed_memory import give_memory_back

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
        most_bytes: up to this, or to its double that holds what is asked for.
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
"""Of the arena of this process."""

_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""A ModelProto: y = Identity (x), one float. What makes the arena give regions back is an option of a run."""


def regions_of(file_bytes: int) -> Regions:
    """Those of an engine whose files have so many bytes."""
    return OWN if file_bytes < SMALL_ENGINE_BYTES else SHARED


class SharedArena:
    """The arena of this process; sessions may be opened and closed by several threads.

    Where another library has registered an arena with ONNX Runtime before, there is none, and sessions have arenas of
    their own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._identity: onnxruntime.InferenceSession | None = None
        self._is_refused = False

    def share(self, options: onnxruntime.SessionOptions) -> None:
        """Have the session that gets these options take its activations' memory there."""
        with self._lock:
            if self._identity is None and not self._is_refused:
                self._identity = _register()
                self._is_refused = self._identity is None
        if self._identity is not None:
            _use(options)

    def give_back(self) -> None:
        """Let the system have regions in which nothing lies, and what was freed beside them."""
        if self._identity is not None:
            _give_regions_back(self._identity)
        give_memory_back()


SHARED_ARENA = SharedArena()


def _register() -> onnxruntime.InferenceSession | None:
    """Register the arena; a session that gives regions back, or None if another library was first."""
    settings = {
        "arena_extend_strategy": 0,  # powers of two
        "initial_chunk_size_bytes": SHARED.kept_bytes,
        "initial_growth_chunk_size_bytes": SHARED.first_bytes,
        "max_power_of_two_extend_bytes": SHARED.most_bytes,
        "max_dead_bytes_per_chunk": SHARED.most_dead_bytes,
    }
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    try:
        onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(settings))
    except RuntimeError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    _use(options)
    identity = onnxruntime.InferenceSession(_IDENTITY, options, providers=["CPUExecutionProvider"])
    _give_regions_back(identity)  # from then on regions have the size of growth
    return identity


def _use(options: onnxruntime.SessionOptions) -> None:
    options.add_session_config_entry("session.use_env_allocators", "1")


def _give_regions_back(identity: onnxruntime.InferenceSession) -> None:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    identity.run(None, {"x": np.zeros(1, np.float32)}, options)
