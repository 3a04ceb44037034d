"""What an evaluation makes: how many pictures, of which prompts, from which seeds, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sdc.compiler.tiny.captions import BACKGROUNDS, COLOURS, GARMENTS, caption
from sdc.engines.deepcache import CacheSchedule
from sdc.engines.errors import InputError

JUDGED_MODEL = "tiny"
"""The model that captions of this project were taught to, and whose pictures the judge knows."""

TRIPLES = len(GARMENTS) * len(COLOURS) * len(BACKGROUNDS)

STRIDE = 71
"""Step through the triples; it has no factor in common with their number, so that a run meets every triple before it
meets one again, and a short run meets many garments and colours."""

SEEDS_A_RUN = 1 << 20
"""Pictures that a run may have without sharing a seed with the run of the next ``--seed``."""

GENERAL_PROMPTS = (
    "a photo of an astronaut riding a horse on the moon",
    "a bowl of fruit on a wooden table, oil painting",
    "portrait of an old fisherman, dramatic light",
    "a red sports car in a narrow street at night, rain",
    "a watercolour of a village in the mountains",
    "a cat asleep on a stack of books",
    "an aerial photo of a river delta",
    "a plate of sushi, studio photograph",
    "a sailing boat in a quiet harbour at dusk",
    "a macro photo of a dragonfly on a leaf",
    "a glass of water on a marble table, backlit",
    "a crowded market square, pencil drawing",
    "a lighthouse in a storm",
    "a fox in a tailored suit, children's book illustration",
    "an empty library with tall windows",
    "snow-covered pine trees at sunrise",
)
"""Prompts for models of general pictures; none of them is a prompt that int8 is calibrated on."""


@dataclass(frozen=True)
class Settings:
    """How the pictures of an evaluation are made.

    Attributes:
        samples: number of pictures.
        seed: of the run; picture i has the seed ``seed * SEEDS_A_RUN + i``, modulo 2³².
        sampler: name of the sampler; with it ``steps`` and ``guidance_scale``.
        guidance_steps: see `sdc.engines.generation.Generation`; likewise ``deepcache`` and ``deepcache_center``.
        batch: pictures made at once; None takes as many as the bundles' engines do.
        target: target of the bundles; None takes the fastest that runs here.
        threads: of the CPU; None leaves it to the backend.
    """

    samples: int = 5000
    seed: int = 0
    sampler: str = "ddim"
    steps: int = 20
    guidance_scale: float = 3.0
    guidance_steps: tuple[int, int] | None = None
    deepcache: CacheSchedule = 1
    deepcache_center: int | None = None
    batch: int | None = None
    target: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= SEEDS_A_RUN:
            raise InputError(f"samples must be in 1..{SEEDS_A_RUN}, found {self.samples}")
        if self.batch is not None and self.batch < 1:
            raise InputError(f"batch must be 1 or more, found {self.batch}")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads must be 1 or more, found {self.threads}")

    def without_shortcuts(self) -> Settings:
        """The same pictures, with every step in full."""
        return replace(self, guidance_steps=None, deepcache=1, deepcache_center=None)

    def picture_seeds(self) -> list[int]:
        """The seed of every picture."""
        return [(self.seed * SEEDS_A_RUN + i) % (1 << 32) for i in range(self.samples)]


def prompt_triples(count: int) -> np.ndarray:
    """(garment, colour, background) indices of `count` pictures: [count, 3], int64, in cycles over all triples."""
    index = np.arange(count) * STRIDE % TRIPLES
    pair, background = np.divmod(index, len(BACKGROUNDS))
    garment, colour = np.divmod(pair, len(COLOURS))
    return np.column_stack([garment, colour, background])


def prompts_of_triples(triples: np.ndarray) -> list[str]:
    """The captions of triples [N, 3], in the first template."""
    return [caption(int(garment), int(colour), int(background)) for garment, colour, background in triples]


def prompts_of_model(model: str, count: int) -> list[str]:
    """`count` prompts in the language of a model, by its name in the manifest."""
    if model == JUDGED_MODEL:
        return prompts_of_triples(prompt_triples(count))
    return [GENERAL_PROMPTS[i % len(GENERAL_PROMPTS)] for i in range(count)]
