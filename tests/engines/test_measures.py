"""Pictures that are drawn in less memory, beside the same without measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_pipeline import ARCHITECTURES, TorchSession, build_diffusers, build_ours

from sdc.engines.errors import InputError
from sdc.engines.measures import Measures
from sdc.engines.networks import DenoisingStep
from sdc.engines.pipeline import Pipeline

PROMPTS = ["a red bag", "a photo of a blue sneaker", "white", "a bag"]


@pytest.fixture(scope="module", params=[ARCHITECTURES[0], ARCHITECTURES[2]], ids=lambda each: each.name)
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Any]:
    folder = tmp_path_factory.mktemp(request.param.name)
    return build_ours(build_diffusers(request.param, folder), folder / "tokenizer", keep_loaded=False)


def rows(loaded: dict[str, TorchSession], component: str) -> list[int]:
    return loaded[component].rows


@pytest.mark.parametrize("options", [{"sampler": "ddim", "eta": 1.0}, {"sampler": "lcm"}, {"seed": [1, 2, 3]}])
def test_groups_get_the_noise_and_the_prompts_of_their_rows(
    drawn: tuple[Pipeline, Any], options: dict[str, Any]
) -> None:
    pipe, loaded = drawn
    options = {"steps": 3, "seed": 5, "guidance_scale": 3.0, **options}
    together = pipe.denoise(pipe.plan(PROMPTS[:3], ["", "blue", "a"], **options))
    in_groups = pipe.plan(PROMPTS[:3], ["", "blue", "a"], measures=Measures(pictures_at_once=2), **options)
    pipe.close()
    steps: list[DenoisingStep] = []
    np.testing.assert_allclose(pipe.denoise(in_groups, on_step=steps.append), together, rtol=0, atol=1e-4)
    assert together.std() > 0.1
    halves = 1 if pipe.settings.time_cond_proj_dim else 2
    assert rows(loaded, "unet") == [2 * halves] * 3 + [halves] * 3
    assert [step.index for step in steps] == [0, 1, 2] * 2
    assert len(rows(loaded, "text_encoder")) == 1, "prompts are encoded before the UNet is loaded, all of them"


def test_groups_may_be_more_pictures_than_the_engine_takes_at_once(drawn: tuple[Pipeline, Any]) -> None:
    pipe, _ = drawn
    with pytest.raises(InputError, match="at a time"):
        pipe.plan(["a"] * 20, guidance_scale=3.0)
    plan = pipe.plan(["a"] * 20, steps=1, seed=1, guidance_scale=3.0, measures=Measures(pictures_at_once=3))
    assert len(pipe.denoise(plan)) == 20


def test_pictures_are_decoded_one_at_a_time(drawn: tuple[Pipeline, Any]) -> None:
    pipe, loaded = drawn
    latents = pipe.denoise(pipe.plan(PROMPTS[:3], steps=2, seed=1))
    whole = pipe.decode(latents)
    assert rows(loaded, "vae_decoder") == [3]
    pipe.close()
    single = pipe.decode(latents, measures=Measures(decoded_at_once=1))
    assert rows(loaded, "vae_decoder") == [1, 1, 1]
    np.testing.assert_allclose(single, whole, rtol=0, atol=1e-5)


def test_pictures_are_decoded_in_tiles(drawn: tuple[Pipeline, Any]) -> None:
    pipe, loaded = drawn
    scale = pipe.settings.vae_reduction
    latents = pipe.denoise(pipe.plan(PROMPTS[:2], steps=2, seed=1, height=14 * scale, width=10 * scale))
    whole = pipe.decode(latents)
    pipe.close()
    tiled = pipe.decode(latents, measures=Measures(tile_px=(8 * scale, 8 * scale), decoded_at_once=1))
    assert rows(loaded, "vae_decoder") == [1] * 2 * 2 * 2, "two pictures in two rows of two tiles"
    assert tiled.shape == whole.shape
    error = np.sqrt(((tiled - whole) ** 2).mean())
    assert 0 < error < 0.5 * whole.std(), "tiles lie where they belong"
    at_least = pipe.decode(latents, measures=Measures(tile_px=(16 * scale, 16 * scale)))
    assert at_least.tobytes() == whole.tobytes(), "a tile that holds the picture is the picture"


def test_pictures_say_how_they_were_drawn(drawn: tuple[Pipeline, Any]) -> None:
    pipe, _ = drawn
    tile = (8 * pipe.settings.vae_reduction,) * 2
    options = {"steps": 2, "seed": 3, "batch": 2, "height": 2 * tile[0]}
    images = pipe(PROMPTS[0], measures=Measures(1, 1, tile), **options)
    expected = {"pictures_at_once": 1, "decoded_at_once": 1, "tile_px": list(tile)}
    assert [json.loads(image.info["sdc"])["measures"] for image in images] == [expected] * 2
    generation = pipe.plan(PROMPTS[0], measures=Measures(1, 1, tile), **options)
    decoded = pipe.decode(pipe.denoise(generation), measures=generation.measures)
    shown = np.stack([np.asarray(image, np.float32) for image in images]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(shown, np.clip(decoded / 2 + 0.5, 0, 1) * 255, rtol=0, atol=0.51)


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        (Measures(pictures_at_once=0), "0 pictures are to be denoised at once"),
        (Measures(decoded_at_once=-1), "-1 pictures are to be decoded at once"),
        (
            Measures(tile_px=(36, 32)),
            "tile height 36 px is not possible with this bundle; choose 16 to 64 in steps of 8",
        ),
        (Measures(tile_px=(32, 8)), "tile width 8 px"),
    ],
)
def test_measures_that_cannot_be_taken_are_refused(tmp_path: Path, measures: Measures, message: str) -> None:
    pipe, loaded = build_ours(build_diffusers(ARCHITECTURES[0], tmp_path), tmp_path / "tokenizer")
    with pytest.raises(InputError, match=message):
        pipe(PROMPTS[0], measures=measures)
    assert not loaded
