"""The file ``calibration/unet.json`` of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

from sdc.engines.errors import InputError
from sdc.passes.precision.calibration_table import CalibrationTable

_HINT = "give a bundle's calibration/unet.json"


def read_table(path: Path) -> CalibrationTable:
    """A calibration that an export has left.

    Raises:
        InputError: the file cannot be read, or is no calibration.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the calibration {path}: {error}", hint=_HINT) from error
    if not isinstance(value, dict) or "graph_digest" not in value:
        raise InputError(f"{path} is no calibration", hint=_HINT)
    return CalibrationTable.from_json(value)
