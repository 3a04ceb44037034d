"""One arena for the activations of all large engines that ONNX Runtime runs on the CPU in this process.

ONNX Runtime has one place for such an arena in a process, and the last one that is registered is what sessions get that
are opened from then on and ask for it. So a program that registers an arena of its own should do so before it opens a
bundle: its sessions that are open keep theirs, later ones that ask get this one. Sessions that do not ask are left
alone.
"""

from __future__ import annotations

import threading

import numpy as np
import onnxruntime

from sdc.engines.freed_memory import give_memory_back
from sdc.engines.sessions.onnxruntime_regions import SHARED

_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""A ModelProto: y = Identity (x), one float. What makes the arena give regions back is an option of a run."""


class SharedArena:
    """The arena; sessions may be opened and closed by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shrinker: onnxruntime.InferenceSession | None = None
        self._is_refused = False

    def share(self, options: onnxruntime.SessionOptions) -> bool:
        """Have the session that gets these options take its activations' memory there; False if there is no arena."""
        with self._lock:
            if self._shrinker is None and not self._is_refused:
                self._shrinker = _register()
                self._is_refused = self._shrinker is None
        if self._shrinker is not None:
            _ask(options)
        return self._shrinker is not None

    def give_back(self) -> None:
        """Let the system have regions in which nothing lies, and what was freed beside them.

        A region in which another thread's run has something now stays until this is called again.
        """
        if self._shrinker is not None:
            _give_regions_back(self._shrinker)
        give_memory_back()


SHARED_ARENA = SharedArena()


def _register() -> onnxruntime.InferenceSession | None:
    """Register the arena; a session that gives regions back, or None if ONNX Runtime refuses it."""
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
    _ask(options)
    shrinker = onnxruntime.InferenceSession(_IDENTITY, options, providers=["CPUExecutionProvider"])
    _give_regions_back(shrinker)  # from then on regions have the size of growth
    return shrinker


def _ask(options: onnxruntime.SessionOptions) -> None:
    options.add_session_config_entry("session.use_env_allocators", "1")


def _give_regions_back(shrinker: onnxruntime.InferenceSession) -> None:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    shrinker.run(None, {"x": np.zeros(1, np.float32)}, options)
