"""The one family of errors that a caller of sdc can cause. Each says what was found and what to do."""

from __future__ import annotations


class SdcError(Exception):
    """Base of all errors that are the caller's or the environment's, not a defect of sdc.

    Args:
        message: what was expected and what was found.
        hint: what to do about it; shown after the message.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}; {hint}")
        self.message = message
        self.hint = hint


class InputError(SdcError):
    """An argument, a file or a folder given by the caller cannot be used, or is not there."""

    exit_code = 2


class BundleError(SdcError):
    """A bundle is damaged, of another schema, or points outside itself."""


class TargetError(SdcError):
    """An engine cannot be built for, or run on, the target that was asked for."""


class ExportError(SdcError):
    """A stage of the export failed; nothing was built on top of it."""


class PassError(SdcError):
    """A graph pass met a graph that it promised to handle and could not."""


class NumericalError(SdcError):
    """An engine produced NaN or infinity."""
