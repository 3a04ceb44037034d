"""Whole pictures against diffusers on the same torch modules, and what a pipeline refuses."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
)
from PIL import Image
from torch_pipeline import ARCHITECTURES, Architecture, TorchSession, build_diffusers, build_ours

from sdc.engines.denoise import denoise_from_epsilon, guide
from sdc.engines.errors import InputError, NumericalError
from sdc.engines.networks import DenoisingStep, Networks
from sdc.engines.noise import noise_from_seeds
from sdc.engines.samplers import SAMPLERS, Sampler

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "lcm": LCMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
}

PROMPT = "a photo of a red sneaker on a white background"
RUNS = [("ddim", 20), ("euler", 20), ("dpmpp-2m", 20), ("lcm", 4)]


class Pair:
    """A diffusers pipeline and ours around the same modules."""

    def __init__(self, architecture: Architecture, folder: Any) -> None:
        self.theirs = build_diffusers(architecture, folder)
        self.tokenizer_folder = folder / "tokenizer"
        self.ours, self.loaded = build_ours(self.theirs, self.tokenizer_folder)
        self.config = dict(self.theirs.scheduler.config)

    def draw_theirs(self, prompt: str | list[str], sampler: str, steps: int, seed: int, **options: Any) -> np.ndarray:
        self.theirs.scheduler = SCHEDULERS[sampler].from_config(self.config)
        generator = torch.Generator().manual_seed(seed)
        return stack(self.theirs(prompt, num_inference_steps=steps, generator=generator, **options).images)


def stack(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, np.float64) for image in images])


def psnr_db(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of the worst picture; 100 if equal."""
    assert ours.shape == theirs.shape
    worst = ((ours - theirs) ** 2).mean((1, 2, 3)).max()
    return 100.0 if worst == 0 else float(10 * np.log10(255**2 / worst))


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda architecture: architecture.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param.name))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(ARCHITECTURES[0], tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(("sampler", "steps"), RUNS)
def test_pictures_equal_diffusers(plain: Pair, sampler: str, steps: int) -> None:
    theirs = plain.draw_theirs(PROMPT, sampler, steps, seed=23, guidance_scale=4.5)
    ours = stack(plain.ours(PROMPT, sampler=sampler, steps=steps, seed=23, guidance_scale=4.5))
    assert theirs.std() > 5, "the pictures show nothing"
    assert psnr_db(ours, theirs) >= 55


@pytest.mark.parametrize(("sampler", "steps"), RUNS)
def test_batch_of_prompts_at_another_size_equals_diffusers(pair: Pair, sampler: str, steps: int) -> None:
    prompts = ["a red bag", "a photo of a blue sneaker, black background", "white"]
    reduction = pair.theirs.vae_scale_factor
    options = {"height": 12 * reduction, "width": 4 * reduction, "guidance_scale": 3.0}
    negative = ["", "blue", "a bag"]
    theirs = pair.draw_theirs(prompts, sampler, steps, seed=5, negative_prompt=negative, **options)
    ours = stack(pair.ours(prompts, negative, sampler=sampler, steps=steps, seed=5, **options))
    assert ours.shape == (3, 12 * reduction, 4 * reduction, 3)
    assert psnr_db(ours, theirs) >= 55


def test_consistency_pipeline_equals_ours(tmp_path_factory: pytest.TempPathFactory) -> None:
    pair = Pair(ARCHITECTURES[2], tmp_path_factory.mktemp("lcm"))
    with torch.no_grad():
        pair.theirs.unet.time_embedding.cond_proj.weight *= 10
    modules = {name: getattr(pair.theirs, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    pipeline = LatentConsistencyModelPipeline(
        **modules,
        scheduler=LCMScheduler.from_config(pair.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 8.5}
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline([PROMPT] * 3, num_inference_steps=4, generator=generator, **options).images
    ours = pair.ours(PROMPT, sampler="lcm", seed=3, batch=3, **options)
    assert psnr_db(stack(ours), stack(theirs)) >= 55
    assert pair.loaded["unet"].rows == [3, 3, 3, 3], "guidance is an input: one batch"
    weaker = pair.ours(PROMPT, sampler="lcm", seed=3, batch=3, guidance_scale=2.0)
    assert psnr_db(stack(weaker), stack(theirs)) < 45, "guidance must matter"


def test_stochastic_ddim_equals_diffusers(plain: Pair) -> None:
    theirs = plain.draw_theirs([PROMPT] * 2, "ddim", 8, seed=2, eta=0.8, guidance_scale=2.0)
    ours = plain.ours(PROMPT, steps=8, seed=2, eta=0.8, guidance_scale=2.0, batch=2)
    assert psnr_db(stack(ours), theirs) >= 55


def test_several_pictures_for_each_prompt_equal_diffusers(plain: Pair) -> None:
    prompts = ["red", "a blue bag"]
    theirs = plain.draw_theirs(prompts, "ddim", 5, seed=2, num_images_per_prompt=3, guidance_scale=1.0)
    ours = plain.ours(prompts, steps=5, seed=2, batch=3, guidance_scale=1.0)
    assert psnr_db(stack(ours), theirs) >= 55


def test_a_seed_for_each_picture_equals_diffusers_and_single_pictures(plain: Pair) -> None:
    seeds = [41, 2**32 - 1, 7]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    plain.theirs.scheduler = LCMScheduler.from_config(plain.config)
    theirs = plain.theirs(
        [PROMPT] * 3, num_inference_steps=4, generator=generators, guidance_scale=2.0, negative_prompt=["bag"] * 3
    ).images
    options: dict[str, Any] = {"sampler": "lcm", "guidance_scale": 2.0}
    ours = plain.ours(PROMPT, "bag", batch=3, seed=seeds, **options)
    assert psnr_db(stack(ours), stack(theirs)) >= 55
    single = plain.ours(PROMPT, "bag", seed=seeds[1], **options)
    assert psnr_db(stack(single), stack(ours[1:2])) >= 55


def test_the_decoder_gets_unscaled_and_shifted_latents(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = noise_from_seeds([6])((2, 4, 4, 6))
    settings = replace(plain.ours.settings, vae_scaling_factor=0.25, vae_shift_factor=0.7)
    monkeypatch.setattr(plain.ours, "settings", settings)
    with torch.no_grad():
        expected = plain.theirs.vae.decode(torch.from_numpy(latents) * 4 + 0.7).sample.numpy()
    np.testing.assert_allclose(plain.ours.decode(latents), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0])
def test_without_guidance_the_unet_runs_one_batch(plain: Pair, guidance_scale: float) -> None:
    plain.ours(PROMPT, steps=2, seed=0)
    plain.loaded["unet"].rows.clear()
    plain.ours(PROMPT, steps=2, seed=0, guidance_scale=guidance_scale, batch=3)
    assert plain.loaded["unet"].rows == [3, 3]
    plain.loaded["unet"].rows.clear()
    plain.ours(PROMPT, steps=2, seed=0, guidance_scale=1.01, batch=3)
    assert plain.loaded["unet"].rows == [6, 6]


def test_guidance_that_spoils_pictures_of_lcm_warns(plain: Pair, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plain.ours.plan(PROMPT, sampler="lcm", guidance_scale=2.0)
        plain.ours.plan(PROMPT, sampler="ddim", guidance_scale=5.0)
        assert not caplog.text
        plain.ours.plan(PROMPT, sampler="lcm")
    assert "guidance 5 spoils pictures of LCM" in caplog.text


def test_a_negative_prompt_without_guidance_warns(plain: Pair, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plain.ours.plan(PROMPT, "blue", guidance_scale=1.0)
    assert "the negative prompt has no effect" in caplog.text


def test_equal_prompts_are_encoded_once_and_long_lists_in_parts(plain: Pair) -> None:
    plain.ours.encode(["red"])
    rows = plain.loaded["text_encoder"].rows
    rows.clear()
    states = plain.ours.encode(["red", "blue"] * 5)
    assert rows == [2]
    np.testing.assert_array_equal(states[0], states[8])
    rows.clear()
    plain.ours.encode([f"a {i} bag" for i in range(13)])
    assert rows == [6, 6, 1]


def test_the_negative_prompt_is_encoded_with_the_others(plain: Pair) -> None:
    plain.ours.encode([PROMPT])
    rows = plain.loaded["text_encoder"].rows
    for negative, guidance_scale, expected in (("blue", 5.0, [2]), (PROMPT, 5.0, [1]), ("blue", 1.0, [1])):
        rows.clear()
        generation = plain.ours.plan([PROMPT] * 2, negative, guidance_scale=guidance_scale)
        states = plain.ours.encode_prompts(generation)
        assert rows == expected
        wanted = [negative, negative, PROMPT, PROMPT] if guidance_scale > 1 else [PROMPT, PROMPT]
        np.testing.assert_allclose(states, [plain.ours.encode([each])[0] for each in wanted], rtol=0, atol=1e-5)


def test_steps_are_reported_with_what_the_unet_got_and_gave(plain: Pair) -> None:
    steps: list[DenoisingStep] = []
    generation = plain.ours.plan(PROMPT, sampler="euler", steps=3, seed=1, batch=2)
    latents = plain.ours.denoise(generation, on_step=steps.append)
    assert latents.shape == (2, 4, 8, 8)
    assert latents.dtype == np.float32
    assert [step.index for step in steps] == [0, 1, 2]
    assert {step.count for step in steps} == {3}
    assert [step.timestep for step in steps] == [667.0, 334.0, 1.0]
    assert 0.8 < steps[0].feeds["sample"].std() < 1.2, "the UNet takes samples of unit variance, not Euler's"
    for step in steps:
        assert step.feeds["sample"].shape == (4, 4, 8, 8)
        again = plain.ours.networks.session("unet").run(step.feeds)["out_sample"]
        np.testing.assert_array_equal(again, step.output)
        assert step.seconds > 0


def test_pictures_carry_their_parameters(plain: Pair) -> None:
    image = plain.ours(["red", "blue"], "bag", steps=2, sampler="ddim", seed=9, guidance_scale=2, batch=1)[1]
    assert json.loads(image.info["sdc"]) == {
        "prompt": "blue",
        "negative_prompt": "bag",
        "sampler": "ddim",
        "steps": 2,
        "guidance_scale": 2.0,
        "seed": 9,
        "width": 32,
        "height": 32,
        "eta": 0.0,
        "guidance_steps": None,
        "deepcache": 1,
        "deepcache_center": None,
        "index": 1,
        "batch": 2,
        "measures": {},
        "model": "untrained",
    }
    assert image.info["parameters"] == (
        "blue\nNegative prompt: bag\nSteps: 2, Sampler: ddim, CFG scale: 2.0, Seed: 9, Size: 32x32, Model: untrained"
    )


def test_a_random_seed_is_recorded_and_repeats_the_picture(plain: Pair) -> None:
    first = plain.ours(PROMPT, steps=2)[0]
    seed = json.loads(first.info["sdc"])["seed"]
    assert stack(plain.ours(PROMPT, steps=2, seed=seed)).tolist() == stack([first]).tolist()


def test_close_releases_engines_and_the_next_call_loads_them_again(plain: Pair) -> None:
    with plain.ours as pipe:
        before = stack(pipe(PROMPT, steps=2, seed=1))
        sessions = list(plain.loaded.values())
    assert all(session.closed for session in sessions)
    plain.ours.close()
    assert stack(plain.ours(PROMPT, steps=2, seed=1)).tolist() == before.tolist()
    assert plain.loaded["unet"] not in sessions


def test_engines_that_are_not_kept_are_never_loaded_together(plain: Pair) -> None:
    expected = stack(plain.ours(PROMPT, steps=2, seed=1))
    pipe, loaded = build_ours(plain.theirs, plain.tokenizer_folder, keep_loaded=False)
    open_at_steps = []

    def look(_: DenoisingStep) -> None:
        open_at_steps.append([name for name, session in loaded.items() if not session.closed])

    for _ in range(2):
        assert stack(pipe(PROMPT, steps=2, seed=1, on_step=look)).tolist() == expected.tolist()
        assert all(session.closed for session in loaded.values())
    assert open_at_steps == [["unet"]] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 36}, "height 36 px .* choose 16 to 64 in steps of 8 px"),
        ({"width": 72}, "width 72 px"),
        ({"height": 8}, "height 8 px"),
        ({"batch": 4}, "4 pictures at guidance 5.0 need 8 rows .* takes 1 to 6; ask for at most 3"),
        ({"batch": 7, "guidance_scale": 1.0}, "at most 6"),
        ({"batch": 0}, "batch 0"),
        ({"steps": 0}, "0 steps"),
        ({"steps": 1001}, "1001 steps .* choose 1 to 1000"),
        ({"sampler": "lcm", "steps": 51}, "51 steps .* 1 to 50"),
        ({"sampler": "plms"}, "unknown sampler 'plms'; choose from ddim, lcm, euler, dpmpp-2m"),
        ({"sampler": "lcm", "eta": 0.5}, "eta"),
        ({"guidance_scale": float("nan")}, "guidance nan"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed 18446744073709551616"),
        ({"seed": [1, 2]}, "2 seeds .* 1 pictures"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts"),
        ({"prompt": []}, "empty"),
    ],
)
def test_refused_before_any_engine_is_loaded(plain: Pair, arguments: dict[str, Any], message: str) -> None:
    plain.ours.close()
    plain.loaded.clear()
    with pytest.raises(InputError, match=message):
        plain.ours(**{"prompt": PROMPT, **arguments})
    assert not plain.loaded


@pytest.mark.parametrize(
    ("component", "place"),
    [
        ("text_encoder", "text_encoder gave NaN"),
        ("unet", r"unet at step 2 of 3 \(timestep 334\) gave NaN or infinity in 1 of 512"),
        ("vae_decoder", "vae_decoder gave NaN"),
    ],
)
def test_not_a_number_names_component_and_step(plain: Pair, component: str, place: str) -> None:
    plain.ours.close()
    session = plain.ours.networks.session(component)
    assert isinstance(session, TorchSession)
    run, calls = session.run, 0

    def poisoned(feeds: Any) -> dict[str, np.ndarray]:
        nonlocal calls
        calls += 1
        outputs = run(feeds)
        if calls == 2 or component != "unet":
            next(iter(outputs.values())).reshape(-1)[3] = np.inf if component == "unet" else np.nan
        return outputs

    session.run = poisoned  # type: ignore[method-assign]
    with pytest.raises(NumericalError, match=place):
        plain.ours(PROMPT, steps=3, seed=0)
    plain.ours.close()


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_loop_costs_less_than_a_millisecond_a_step(plain: Pair, sampler: Sampler) -> None:
    """Batch 1, 64x64 latents, guidance on, and a UNet that costs nothing."""

    class InstantSession(TorchSession):
        def run(self, feeds: Any) -> dict[str, np.ndarray]:
            return {"out_sample": feeds["sample"]}

    spec = plain.ours.networks.specs["unet"]
    networks = Networks({"unet": spec}, lambda _: InstantSession(spec, torch.nn.Identity()))
    conditions = {"encoder_hidden_states": np.zeros((2, 77, 24), np.float32)}
    draw_noise = noise_from_seeds([0])
    transitions = sampler.plan(plain.ours.schedule, 25).transitions
    timesteps = [now.timestep for now, _ in transitions]

    def seconds_per_step() -> float:
        predict = guide(networks.predictor(conditions, steps=25, timesteps=timesteps), 5.0)
        begin = time.process_time()  # a busy neighbour does not count
        sampler.sample(denoise_from_epsilon(predict), draw_noise((1, 4, 64, 64)), transitions, draw_noise)
        return (time.process_time() - begin) / 25

    assert min(seconds_per_step() for _ in range(5)) < 1e-3
