"""What `tiny` can be asked for: garments, colours and backgrounds, and the captions that say them.

Apart from `sdc.compiler.tiny.data`, so that who needs words alone imports no torch.
"""

from __future__ import annotations

GARMENTS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
"""Names of the ten classes, in the data set's own order."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (235, 220, 20),
    "green": (30, 170, 50),
    "cyan": (20, 200, 210),
    "blue": (40, 70, 225),
    "purple": (140, 50, 190),
    "pink": (255, 120, 180),
}
"""Colour names and their 8-bit sRGB values."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (0, 0, 0), "white": (255, 255, 255)}

TEMPLATES = (
    "a photo of a {colour} {garment} on a {background} background",
    "a {colour} {garment} on a {background} background",
    "a picture of a {colour} {garment}, {background} background",
    "{colour} {garment}, {background} background",
)
"""Caption templates; the first is the one that evaluation uses."""

HELD_OUT = frozenset((garment, (3 * garment + 1) % len(COLOURS)) for garment in range(len(GARMENTS)))
"""(garment, colour) index pairs that the UNet never sees in training: one colour for each garment."""


def caption(garment: int, colour: int, background: int, template: int = 0) -> str:
    """The caption of a picture, e.g. "a photo of a red sneaker on a white background"."""
    return TEMPLATES[template].format(
        garment=GARMENTS[garment], colour=list(COLOURS)[colour], background=list(BACKGROUNDS)[background]
    )


def all_captions() -> list[str]:
    """Every caption that the templates can say, in a fixed order."""
    return [
        caption(garment, colour, background, template)
        for template in range(len(TEMPLATES))
        for garment in range(len(GARMENTS))
        for colour in range(len(COLOURS))
        for background in range(len(BACKGROUNDS))
    ]
