"""Which processes stay up between rounds: as many as fit into memory, those first that are slow to open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

UNKNOWN_BYTES = 8 << 30
"""What a process may take that was not measured yet."""


class Closable(Protocol):
    """What is kept."""

    def peak_bytes(self) -> int:
        """Most memory so far."""

    def close(self) -> None:
        """End it."""


Process = TypeVar("Process", bound=Closable)


class Residents(Generic[Process]):
    """Opened processes of one component, by side.

    After its turn a process stays if all that stay, and the largest that may be opened beside them, fit. The order of
    the sides decides who comes first; torch.compile, which compiles for minutes, is at their head.

    Args:
        budget_bytes: for all of them together.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._kept: dict[str, Process] = {}
        self._peaks: dict[str, int] = {}

    def take(self, side: str, start: Callable[[], Process]) -> tuple[Process, bool]:
        """The side's process, and whether `start` opened it now."""
        if side in self._kept:
            return self._kept[side], False
        self._kept[side] = start()
        return self._kept[side], True

    def release(self, side: str, sides: list[str]) -> None:
        """After a turn: keep the process or end it.

        Args:
            side: whose turn it was.
            sides: all that take turns.
        """
        self._peaks[side] = self._kept[side].peak_bytes()
        kept = sum(self._peaks[each] for each in self._kept)
        beside = [self._peaks.get(each, UNKNOWN_BYTES) for each in sides if each not in self._kept]
        if kept + max(beside, default=0) > self._budget_bytes:
            self.drop(side)

    def drop(self, side: str) -> None:
        """End a side's process, if it is up."""
        process = self._kept.pop(side, None)
        if process is not None:
            process.close()

    def close(self) -> None:
        """End all."""
        for side in list(self._kept):
            self.drop(side)
