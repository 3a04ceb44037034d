"""Painted stripes and their measure, against what can be worked out by hand; and that what ships draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdc.compiler.compile import export_bundle
from sdc.compiler.evaluate.opened import opened
from sdc.compiler.evaluate.settings import Settings, prompt_triples, prompts_of_triples
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import Source
from sdc.compiler.tiny.captions import BACKGROUNDS, COLOURS
from sdc.compiler.tiny.data import render
from sdc.compiler.tiny.stripes import OPACITY, paint_stripes, stripe_contrast
from sdc.engines.targets import parse_targets


def drawn(pixels: np.ndarray, colours: np.ndarray, backgrounds: np.ndarray) -> np.ndarray:
    """[N, 3, 32, 32] in [0, 1]."""
    return (render(pixels, colours, backgrounds) / 2 + 0.5).numpy()


def every_pair() -> tuple[np.ndarray, np.ndarray]:
    pairs = np.indices((len(COLOURS), len(BACKGROUNDS))).reshape(2, -1)
    return pairs[0], pairs[1]


def test_stripes_are_rows_of_latents() -> None:
    painted = paint_stripes(np.full((2, 28, 28), 200, np.uint8))
    rows = drawn(painted, np.array([0, 5]), np.array([0, 0]))[:, 0, :, 16]
    dimmed = np.flatnonzero(np.isclose(rows[0], rows[0, 16] * OPACITY, atol=0.01))
    assert dimmed.tolist() == [*range(4, 8), *range(12, 16), *range(20, 24), *range(28, 30)]


def test_a_full_garment_has_the_contrast_of_its_opacities() -> None:
    colours, backgrounds = every_pair()
    pixels = np.zeros((len(colours), 28, 28), np.uint8)
    pixels[:, 2:26, 5:20] = 240  # rows 4 to 27 of the picture: three stripes, three gaps
    plain = stripe_contrast(drawn(pixels, colours, backgrounds), colours, backgrounds)
    np.testing.assert_allclose(plain, 0, atol=1e-6)
    striped = stripe_contrast(drawn(paint_stripes(pixels), colours, backgrounds), colours, backgrounds)
    np.testing.assert_allclose(striped, (1 - OPACITY) / (1 + OPACITY), atol=1e-3)


def test_an_empty_picture_has_none() -> None:
    colours, backgrounds = every_pair()
    blank = drawn(np.zeros((len(colours), 28, 28), np.uint8), colours, backgrounds)
    np.testing.assert_array_equal(stripe_contrast(blank, colours, backgrounds), 0)


def contrast(bundle: Path, sampler: str, steps: int, guidance: float) -> float:
    count = 120
    triples = prompt_triples(count)
    with opened(bundle, Settings(count, sampler=sampler, steps=steps, guidance_scale=guidance)) as made:
        batch, prompts, seeds = made.largest_batch(), prompts_of_triples(triples), made.settings.picture_seeds()
        parts = [made.make_pictures(prompts[i : i + batch], seeds[i : i + batch]) for i in range(0, count, batch)]
    return float(stripe_contrast(np.concatenate(parts), triples[:, 1], triples[:, 2]).mean())


@pytest.mark.slow
def test_the_lora_that_ships_draws_stripes_alone_and_beside_the_other(tmp_path: Path) -> None:
    found = {}
    ways = {(): ("ddim", 20, 1.9), ("tiny-stripes",): ("ddim", 20, 1.9), ("tiny-stripes", "tiny-lcm"): ("lcm", 4, 1.0)}
    for loras, way in ways.items():
        out = tmp_path / ("-".join(loras) or "plain")
        source = Source("tiny", loras=loras)
        export_bundle(ExportRequest(source, PrecisionRequest("fp32"), parse_targets("cpu"), out))
        found[loras] = contrast(out, *way)
    plain, style, both = found.values()
    assert abs(plain) < 0.05
    assert min(style, both) > 0.2
