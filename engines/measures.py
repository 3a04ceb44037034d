"""What can be done to draw pictures in less memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measures:
    """How the pictures of one call are drawn; without any measure all at once, as far as the engines take them.

    Only tiles change pictures to speak of. Fewer rows at a time do no more than round differently.

    Attributes:
        pictures_at_once: that are denoised together, the others after them; None for all. A number that divides all
            pictures suits backends that compile for one size.
        decoded_at_once: pictures for each run of the VAE decoder; None for as many as it takes.
        tile_px: height and width of the overlapping tiles in which pictures are decoded; None for whole pictures.
    """

    pictures_at_once: int | None = None
    decoded_at_once: int | None = None
    tile_px: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of the measures that are taken."""
        tile = None if self.tile_px is None else list(self.tile_px)
        values = {"pictures_at_once": self.pictures_at_once, "decoded_at_once": self.decoded_at_once, "tile_px": tile}
        return {name: value for name, value in values.items() if value is not None}


NO_MEASURES = Measures()
"""All pictures at once, as far as the engines take them."""
