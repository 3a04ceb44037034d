"""Progress that is interrupted, as by a signal."""

from __future__ import annotations

from sdc.compiler.workshop.progress import Silent, StageRecord


class Stops(Silent):
    """Raises what a signal would, when so many stages have ended; 0 for never. Keeps the names of all."""

    def __init__(self, after: int = 0) -> None:
        self.left = after
        self.names: list[str] = []

    def end(self, record: StageRecord) -> None:
        self.names.append(record.name)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
