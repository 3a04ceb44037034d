"""The seam between the runtime and a backend: a loaded engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from sdc.engines.specs import ComponentSpec

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Feeds to results, by name."""


class Session(Protocol):
    """A loaded engine. Sessions are not thread-safe; close them, or use them as context managers."""

    spec: ComponentSpec

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; feeds and results are named as in `spec`. Feeds are not kept or changed.

        Raises:
            InputError: a feed is missing, or its element type or shape is outside `spec`.
        """
        ...

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """A function that runs the engine with these feeds and the ones that it is given, which must be all others.

        What is held is checked once and handed to the backend once, as far as it allows that; it must not be changed
        while the function is in use. Several such functions and `run` may be used in turn.

        Raises:
            InputError: as `run`; the function raises it too.
        """
        ...

    @property
    def memory_bytes(self) -> int:
        """Bytes of weights and activations that the session holds, as far as the backend tells; 0 if it does not."""
        ...

    def close(self) -> None:
        """Release the engine; may be called twice."""
        ...

    def __enter__(self) -> Session: ...

    def __exit__(self, *exception: object) -> None: ...


@runtime_checkable
class Preparable(Protocol):
    """A session that gets ready for the sizes of its inputs when it is first run, or is told them before."""

    def prepare(
        self, *shapes: Mapping[str, tuple[int, ...]], before_weights: Callable[[], object] = lambda: None
    ) -> None:
        """Get ready for inputs of these shapes, by name; all of them are given. Of several, runs will have any.

        Args:
            shapes: by name of the input.
            before_weights: called before what takes most of the engine's memory; may wait until there is some, or raise
                to give up.

        Raises:
            BundleError: the backend cannot.
        """
        ...
