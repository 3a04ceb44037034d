"""OpenVINO's core."""

from __future__ import annotations

import threading

import openvino

_lock = threading.Lock()
_cores: list[openvino.Core] = []


def openvino_core() -> openvino.Core:
    """The one core of this process, which stays until its end.

    On processors with AMX the CPU plugin of each core gives the thread that creates it another stack for signals. When
    it goes it puts back the one that was there before: perhaps that of another plugin, which has gone since. The next
    signal that Python handles then ends the process with a segmentation fault. So plugins neither come nor go.

    Source: calls of sigaltstack by OpenVINO 2026.4's CPU plugin, in its constructor and destructor.
    """
    with _lock:
        if not _cores:
            _cores.append(openvino.Core())
        return _cores[0]
