"""What has to be done to stay below a limit, as it is told; `fit.py` finds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdc.compiler.byte_sizes import gibibytes
from sdc.engines.measures import Measures


@dataclass(frozen=True)
class Fit:
    """Pictures that fit.

    Attributes:
        limit_bytes: of the whole process.
        run_bytes: what it is predicted to take.
        measures: what has to be done.
    """

    limit_bytes: int
    run_bytes: int
    measures: Measures

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"limit_bytes": self.limit_bytes, "run_bytes": self.run_bytes, "measures": self.measures.to_json()}

    def __str__(self) -> str:
        measures = self.measures
        done = []
        if measures.pictures_at_once is not None:
            done.append(f"the UNet denoises {_pictures(measures.pictures_at_once)} at a time")
        if measures.tile_px is not None:
            done.append(f"the VAE decodes in tiles of {measures.tile_px[1]} x {measures.tile_px[0]} px")
        elif measures.decoded_at_once is not None:
            done.append(f"the VAE decodes {_pictures(measures.decoded_at_once)} at a time")
        what = " and ".join(done) or "nothing has to be done"
        return f"{gibibytes(self.run_bytes)} of {gibibytes(self.limit_bytes)}: {what}"


def _pictures(count: int) -> str:
    return f"{count} picture{'s' if count > 1 else ''}"
