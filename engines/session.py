"""The seam between the runtime and a backend: a loaded engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from sdc.engines.specs import ComponentSpec


class Session(Protocol):
    """A loaded engine. Sessions are not thread-safe; close them, or use them as context managers."""

    spec: ComponentSpec

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; feeds and results are named as in `spec`. Feeds are not kept or changed.

        Raises:
            InputError: a feed is missing, or its element type or shape is outside `spec`.
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
