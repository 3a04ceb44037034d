"""What a session is opened from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdc.engines.errors import BundleError, TargetError
from sdc.engines.specs import ComponentSpec


@dataclass(frozen=True)
class EngineSource:
    """An engine on disk.

    Attributes:
        spec: the component's interface.
        backend: the library that runs it.
        files: paths of its files; the backend opens the first.
        options: what the builder wants the backend to be told.
        compute_capabilities: GPU generations that it was built for.
        origin: what it was built for and with, in words for errors.
    """

    spec: ComponentSpec
    backend: str
    files: tuple[Path, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    compute_capabilities: tuple[str, ...] = ()
    origin: str = "the engine's origin is unknown"

    def unreadable(self, reason: object) -> BundleError:
        """The error for files that the backend cannot read."""
        return BundleError(
            f"{self.files[0]} is not an engine that {self.backend} can read: {one_line(reason)}",
            hint=f"{self.origin}; export the bundle again",
        )

    def unrunnable(self, reason: object) -> TargetError:
        """The error for an engine that this machine cannot run."""
        return TargetError(
            f"cannot run {self.files[0]} here: {one_line(reason)}",
            hint=f"{self.origin}; `sdc doctor` shows what this machine can run",
        )


def one_line(reason: object) -> str:
    """A backend's words for an error of ours, 300 characters at most."""
    return " ".join(str(reason).split())[:300] or "no reason was given"
