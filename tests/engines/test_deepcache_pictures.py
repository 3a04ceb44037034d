"""Whole pictures of `tiny` with DeepCache and guidance at some steps, against the same schedule in torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch_pipeline import TorchSession

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.compiler.deepcache import divide_unet
from sdc.compiler.evaluate.cache_errors import measure_costs
from sdc.compiler.load import load_checkpoint
from sdc.compiler.stages import MODEL_NAME, Source, fused_component, open_source
from sdc.compiler.trace.export import export_component
from sdc.compiler.trace.interfaces import component_spec, pipeline_settings
from sdc.engines.errors import InputError
from sdc.engines.measures import Measures
from sdc.engines.networks import DenoisingStep
from sdc.engines.pipeline import Pipeline
from sdc.engines.schedule_config import schedule_from_config
from sdc.engines.session import Session
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import SHALLOW
from sdc.engines.targets import TARGETS
from sdc.engines.tokenizer import load_tokenizer
from sdc.passes.base import run_passes
from sdc.passes.pipeline import lowering_passes

PROMPT = "a photo of a red sneaker on a white background"
GUIDANCE, STEPS, SEED = 3.0, 12, 23


class CachingUnet:
    """diffusers' UNet, layer by layer, with the features that enter the last layers of the last block kept.

    Source: `UNet2DConditionModel.forward`, and `CrossAttnUpBlock2D.forward` of its last block.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        self.deep: torch.Tensor | None = None

    def whole(self, sample: torch.Tensor, timestep: int, states: torch.Tensor) -> torch.Tensor:
        unet, embedded = self.unet, self._embed(timestep, sample)
        x = first = unet.conv_in(sample)
        skips = [first]
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                x, made = block(x, embedded, encoder_hidden_states=states)
            else:
                x, made = block(x, embedded)
            skips += made
        x = unet.mid_block(x, embedded, encoder_hidden_states=states)
        for block in unet.up_blocks[:-1]:
            count = len(block.resnets)
            skips, taken = skips[:-count], tuple(skips[-count:])
            if getattr(block, "has_cross_attention", False):
                x = block(x, taken, embedded, encoder_hidden_states=states)
            else:
                x = block(x, taken, embedded)
        last = unet.up_blocks[-1]
        for resnet, attention in zip(last.resnets[:-1], last.attentions[:-1], strict=True):
            x = resnet(torch.cat([x, skips.pop()], dim=1), embedded)
            x = attention(x, encoder_hidden_states=states, return_dict=False)[0]
        self.deep = x
        assert len(skips) == 1
        return self._finish(first, embedded, states)

    def shallow(self, sample: torch.Tensor, timestep: int, states: torch.Tensor) -> torch.Tensor:
        assert self.deep is not None
        self.deep = self.deep[-len(sample) :]
        return self._finish(self.unet.conv_in(sample), self._embed(timestep, sample), states)

    def _embed(self, timestep: int, sample: torch.Tensor) -> torch.Tensor:
        times = torch.full((len(sample),), float(timestep))
        return self.unet.time_embedding(self.unet.time_proj(times))

    def _finish(self, first: torch.Tensor, embedded: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        last = self.unet.up_blocks[-1]
        x = last.resnets[-1](torch.cat([self.deep, first], dim=1), embedded)
        x = last.attentions[-1](x, encoder_hidden_states=states, return_dict=False)[0]
        return self.unet.conv_out(self.unet.conv_act(self.unet.conv_norm_out(x)))


@dataclass(frozen=True)
class Tiny:
    """The model in torch, and what is around its UNet; the UNet's engines by target."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler_config: dict[str, object]
    around: Pipeline
    engines: dict[str, dict[str, EngineSource]]
    modules: dict[str, torch.nn.Module]

    def draw_theirs(self, prompt: str, full: Iterable[int], guided: range = range(STEPS)) -> np.ndarray:
        """[H, W, 3], 0 to 255, with the whole UNet at the steps `full`, and guidance at those of `guided`."""
        scheduler = DDIMScheduler.from_config(self.scheduler_config)
        scheduler.set_timesteps(STEPS)
        states = torch.from_numpy(self.around.encode(["", prompt]))
        size = self.around.settings.default_height_px // self.around.settings.vae_reduction
        latents = torch.randn((1, 4, size, size), generator=torch.Generator().manual_seed(SEED))
        network = CachingUnet(self.unet)
        with torch.no_grad():
            for index, timestep in enumerate(scheduler.timesteps.tolist()):
                call = network.whole if index in set(full) else network.shallow
                if index in guided:
                    unconditional, conditional = call(torch.cat([latents, latents]), timestep, states).chunk(2)
                    epsilon = unconditional + GUIDANCE * (conditional - unconditional)
                else:
                    epsilon = call(latents, timestep, states[1:])
                latents = scheduler.step(epsilon, timestep, latents).prev_sample
            decoded = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        pixels = (decoded / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
        return (pixels * 255).round().astype(np.float64)

    def pipeline(
        self, target: str, *, keep_loaded: bool = True, without: str = "", loaded: list[str] | None = None
    ) -> Pipeline:
        """Around the engines of a target; `loaded` gets the name of each that is loaded."""
        specs = {name: source.spec for name, source in self.engines[target].items() if name != without}

        def load(name: str) -> Session:
            if loaded is not None:
                loaded.append(name)
            if name in specs:
                return open_session(self.engines[target][name], threads=1)
            return TorchSession(self.around.networks.specs[name], self.modules[name])

        return Pipeline(
            tokenizer=self.around.tokenizer,
            schedule=self.around.schedule,
            settings=self.around.settings,
            specs={**self.around.networks.specs, **specs},
            load_session=load,
            keep_loaded=keep_loaded,
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint, opened = load_checkpoint("tiny"), open_source(Source("tiny"))
    specs = {name: component_spec(name, opened.configs) for name in ("text_encoder", "unet", "vae_decoder")}
    export_component(checkpoint, "unet", opened.configs, folder / MODEL_NAME)
    engines: dict[str, dict[str, EngineSource]] = {}
    for target in ("ort-cpu", "cpu"):
        fused, _ = fused_component(specs["unet"], folder, True)
        for part in divide_unet(fused, hoist=True, deepcache=0)[0]:
            engines.setdefault(target, {})[part.spec.name] = build_part(part, target, folder / target)
    vae = checkpoint.vae()
    modules: dict[str, torch.nn.Module] = {"text_encoder": checkpoint.text_encoder(), "vae_decoder": vae}
    (folder / "tokenizer").mkdir()
    for name, content in checkpoint.tokenizer_files.items():
        (folder / "tokenizer" / name).write_bytes(content)
    settings = pipeline_settings(opened.configs)
    around = Pipeline(
        tokenizer=load_tokenizer(folder / "tokenizer", max_tokens=settings.max_tokens),
        schedule=schedule_from_config(checkpoint.scheduler_config),
        settings=settings,
        specs=specs,
        load_session=lambda name: TorchSession(specs[name], modules[name]),
    )
    return Tiny(checkpoint.unet(), vae, dict(checkpoint.scheduler_config), around, engines, modules)


def build_part(part: Component, target: str, folder: Path) -> EngineSource:
    run_passes(lowering_passes(TARGETS[target].backend), part.model)
    built = build_engine(part, TARGETS[target], folder / part.spec.name)
    files = tuple(folder / part.spec.name / name for name in built.files)
    return EngineSource(part.spec, TARGETS[target].backend, files, built.options)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64)


def psnr_db(found: np.ndarray, wanted: np.ndarray) -> float:
    error = ((found - wanted) ** 2).mean()
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("target", ["ort-cpu", "cpu"])
@pytest.mark.parametrize(
    ("options", "full"),
    [
        ({"deepcache": 3}, range(0, STEPS, 3)),
        ({"deepcache": 5}, range(0, STEPS, 5)),
        ({"deepcache": 3, "deepcache_center": 4}, (0, 3, 5, 8)),
        ({"deepcache": [0, 1, 7]}, (0, 1, 7)),
        ({}, range(STEPS)),
        ({"guidance_steps": (2, 8)}, range(STEPS)),
        ({"guidance_steps": (0, 5)}, range(STEPS)),
        ({"guidance_steps": (5, STEPS)}, range(STEPS)),
        # The step at which guidance begins needs deep features of the unconditional half.
        ({"guidance_steps": (2, 8), "deepcache": 3}, (0, 2, 3, 6, 9)),
    ],
)
def test_pictures_equal_those_of_torch(tiny: Tiny, target: str, options: dict[str, Any], full: Iterable[int]) -> None:
    guided = range(*options.get("guidance_steps", (0, STEPS)))
    wanted = tiny.draw_theirs(PROMPT, full, guided)
    steps: list[DenoisingStep] = []
    with tiny.pipeline(target) as pipe:
        (image,) = pipe(PROMPT, steps=STEPS, guidance_scale=GUIDANCE, seed=SEED, on_step=steps.append, **options)
    assert wanted.std() > 20, "the picture shows nothing"
    assert psnr_db(pixels(image), wanted) >= 50
    assert [step.index for step in steps if step.component == "unet"] == list(full)
    assert [step.index for step in steps if len(step.output) == 2] == list(guided)


def test_schedules_make_other_pictures(tiny: Tiny) -> None:
    """Else the comparison with torch would prove little."""
    pictures = [tiny.draw_theirs(PROMPT, range(0, STEPS, interval)) for interval in (1, 3, 5)]
    assert psnr_db(pictures[0], pictures[1]) < 45
    assert psnr_db(pictures[1], pictures[2]) < 45
    for guided in (range(2, 8), range(5), range(5, STEPS)):
        assert psnr_db(pictures[0], tiny.draw_theirs(PROMPT, range(STEPS), guided)) < 45


@pytest.mark.parametrize("target", ["ort-cpu", "cpu"])
def test_an_interval_of_one_changes_no_byte(tiny: Tiny, target: str) -> None:
    options = {"steps": 4, "guidance_scale": GUIDANCE, "seed": SEED}
    with tiny.pipeline(target, without=SHALLOW) as plain, tiny.pipeline(target) as pipe:
        without, with_it = plain(PROMPT, **options)[0], pipe(PROMPT, deepcache=1, **options)[0]  # type: ignore[arg-type]
    assert with_it.tobytes() == without.tobytes()
    assert with_it.info == without.info


def test_pictures_say_how_they_were_made(tiny: Tiny) -> None:
    with tiny.pipeline("ort-cpu") as pipe:
        images = pipe(PROMPT, steps=4, seed=1, batch=2, deepcache=2, deepcache_center=3)
    found = json.loads(images[1].info["sdc"])
    assert (found["deepcache"], found["deepcache_center"], found["index"]) == (2, 3, 1)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m", "lcm"])
def test_every_sampler_draws_with_it(tiny: Tiny, sampler: str) -> None:
    steps: list[DenoisingStep] = []
    with tiny.pipeline("ort-cpu") as pipe:
        pipe(
            PROMPT,
            sampler=sampler,
            steps=5,
            seed=1,
            guidance_scale=1.5,
            guidance_steps=(2, 4),
            deepcache=2,
            on_step=steps.append,
        )
    assert [step.component == "unet" for step in steps] == [True, False, True, False, True]
    assert [len(step.output) for step in steps] == [1, 1, 2, 2, 1]


def test_groups_of_pictures_keep_deep_features_of_their_own(tiny: Tiny) -> None:
    options = {"steps": 5, "seed": 1, "guidance_scale": GUIDANCE, "deepcache": 2}
    prompts = [PROMPT, "a photo of a blue bag", "a coat"]
    loaded: list[str] = []
    with tiny.pipeline("ort-cpu", keep_loaded=False, loaded=loaded) as pipe:
        together = pipe.denoise(pipe.plan(prompts, **options))  # type: ignore[arg-type]
        pipe.close()
        loaded.clear()
        alone = pipe.denoise(pipe.plan(prompts, measures=Measures(pictures_at_once=1), **options))  # type: ignore[arg-type]
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-3)
    assert np.abs(together[0] - together[1]).max() > 0.1
    assert loaded == ["text_encoder", "unet", SHALLOW, "unet_prompt"], "each once for all groups"


def test_both_unets_stay_loaded_while_they_run_in_turn(tiny: Tiny) -> None:
    loaded: list[str] = []
    pipe = tiny.pipeline("ort-cpu", keep_loaded=False, loaded=loaded)
    plan = pipe.plan(PROMPT, steps=5, seed=1, deepcache=2)
    held: list[set[str]] = []
    pipe.denoise(plan, on_step=lambda _: held.append(set(pipe.networks._sessions)))
    assert held == [{"unet", SHALLOW}] * 5
    assert loaded == ["text_encoder", "unet", SHALLOW, "unet_prompt", "unet_timestep"]
    pipe.decode(np.zeros((1, 4, 8, 8), np.float32))
    assert set(pipe.networks._sessions) == {"vae_decoder"}


def test_guidance_at_every_step_changes_no_byte(tiny: Tiny) -> None:
    options: dict[str, Any] = {"steps": 4, "guidance_scale": GUIDANCE, "seed": SEED}
    with tiny.pipeline("cpu") as pipe, tiny.pipeline("cpu") as other:
        assert pipe(PROMPT, **options)[0].tobytes() == other(PROMPT, guidance_steps=(0, 4), **options)[0].tobytes()


def test_the_engine_for_some_guided_steps_takes_every_size(tiny: Tiny) -> None:
    """A size that is known to come is no reason to compile twice in a picture."""
    engines: set[tuple[str, int]] = set()

    def note(step: DenoisingStep) -> None:
        engine = pipe.networks.session(step.component)._engine  # type: ignore[attr-defined]
        assert engine.shapes is None
        engines.add((step.component, id(engine)))

    with tiny.pipeline("cpu") as pipe:
        pipe(PROMPT, steps=8, seed=1, guidance_steps=(2, 5), deepcache=2, on_step=note)
    assert len(engines) == 2


@pytest.mark.parametrize("asked", [(-1, 3), (3, 3), (4, 2), (0, 21)])
def test_steps_that_are_none_are_refused(tiny: Tiny, asked: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"steps {asked[0]}:{asked[1]} was asked for; there are 20; choose FIRST:END"):
        tiny.pipeline("cpu").plan(PROMPT, steps=20, guidance_steps=asked)


def test_steps_of_no_guidance_are_refused(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="there is none to limit; choose a guidance above 1"):
        tiny.pipeline("cpu").plan(PROMPT, guidance_scale=1, guidance_steps=(2, 4))


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_the_cost_of_old_features_at_the_last_step_is_what_it_changes(tiny: Tiny, guidance: float) -> None:
    with tiny.pipeline("ort-cpu") as pipe:
        whole = pipe.plan([PROMPT, "a blue bag"], steps=6, seed=[1, 2], guidance_scale=guidance)
        costs = measure_costs(pipe, whole)
        change = pipe.denoise(replace(whole, deepcache=(0, 1, 2, 3, 4))) - pipe.denoise(whole)
        found = np.sqrt(np.mean(np.square(change, dtype=np.float64)))
    assert costs[4, 5] == pytest.approx(found, rel=1e-3)
    assert costs[4, 5] < costs[0, 5]
    assert np.all(costs[np.triu_indices(6, k=1)] > 0)
    assert np.all(np.tril(costs) == 0)


def test_without_deepcache_the_shallow_unet_is_not_loaded(tiny: Tiny) -> None:
    with tiny.pipeline("ort-cpu") as pipe:
        pipe(PROMPT, steps=2, seed=1)
        assert SHALLOW not in pipe.networks._sessions


def test_a_bundle_without_a_shallow_unet_says_how_to_get_one(tiny: Tiny) -> None:
    pipe = tiny.pipeline("ort-cpu", without=SHALLOW)
    with pytest.raises(
        InputError, match="deepcache 3 was asked for, and the bundle has no shallow UNet; export it with"
    ):
        pipe.plan(PROMPT, deepcache=3)
    with pytest.raises(InputError, match="deepcache center 20 is outside"):
        tiny.pipeline("ort-cpu").plan(PROMPT, steps=20, deepcache=3, deepcache_center=20)
    with pytest.raises(InputError, match="deepcache 0 was asked for"):
        tiny.pipeline("ort-cpu").plan(PROMPT, deepcache=0)
