"""Waits for an engine that is loaded ahead, is interrupted, and prints what happened; run by the tests of that."""

from __future__ import annotations

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from sdc.engines.networks import Networks
from sdc.engines.sessions.feeds import Shapes
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec

PATIENCE_SECONDS = 60.0
MAIN_THREAD = threading.main_thread().ident or 0
SPEC = ComponentSpec("unet", (TensorSpec("sample", "float32", ("N",)),), (), {"N": DimensionRange(1, 1, 1)})

going_on = threading.Event()


def waits_for_an_engine(thread: int) -> bool:
    """Whether a thread is within `LoadAhead.take`, in the wait itself."""
    frame = sys._current_frames().get(thread)
    names = [each.f_code.co_name for each, _ in traceback.walk_stack(frame)]
    return names[:1] == ["wait"] and "take" in names


class Slow:
    """An engine that is made ready for as long as the main thread does nothing but wait, and then interrupts it."""

    spec = SPEC
    memory_bytes = 0

    def prepare(self, *_: Shapes, before_weights: Callable[[], object]) -> None:
        before_weights()
        while not waits_for_an_engine(MAIN_THREAD):
            time.sleep(0.001)
        signal.pthread_kill(MAIN_THREAD, signal.SIGINT)
        assert going_on.wait(PATIENCE_SECONDS), "the one who waits was not interrupted"

    def close(self) -> None:
        print("closed")


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is inherited, and may be ignored
    networks = Networks({"unet": SPEC}, lambda _: Slow())  # type: ignore[arg-type,return-value]
    networks.load_unet_ahead([(1,)])
    try:
        networks.session("unet")
    except KeyboardInterrupt:
        print("interrupted")
    going_on.set()
    networks.release()
    for thread in threading.enumerate():
        if thread.name.startswith("sdc-load"):
            thread.join(PATIENCE_SECONDS)
    print(f"{threading.active_count()} thread")


if __name__ == "__main__":
    main()
