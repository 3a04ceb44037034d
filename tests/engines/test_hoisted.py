"""Pictures of a hoisted UNet equal those of a classic one, and its engines run as often as they must and no more."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_pipeline import ARCHITECTURES, build_diffusers, settings_of, specs_of

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.compiler.hoisting import common_specs, hoist_component
from sdc.engines.errors import BundleError, ExportError, InputError, NumericalError
from sdc.engines.networks import DenoisingStep, Networks
from sdc.engines.pipeline import Pipeline
from sdc.engines.schedule_config import schedule_from_config
from sdc.engines.session import Run, Session
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS
from sdc.engines.tokenizer import load_tokenizer
from sdc.engines.wiring import check_wiring
from sdc.passes.base import run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes

sys.path.append(str(Path(__file__).parents[1] / "passes"))
from exported_graphs import load_graph

CHANNELS, WIDTH = 4, 64
SIZES = {"B": DimensionRange(1, 2, 6), "H": DimensionRange(4, 8, 16, 4), "W": DimensionRange(4, 8, 16, 4)}
SPEC = ComponentSpec(
    "unet",
    (
        TensorSpec("sample", "float32", ("B", CHANNELS, "H", "W")),
        TensorSpec("timestep", "float32", (1,)),
        TensorSpec("encoder_hidden_states", "float32", ("B", 77, WIDTH)),
    ),
    (TensorSpec("out_sample", "float32", ("B", CHANNELS, "H", "W")),),
    SIZES,
)
PROMPTS = ["a red bag", "a photo of a blue sneaker, black background", "white"]
NEGATIVE = ["", "blue", "a bag"]


class Counting:
    """A session that counts its runs and keeps what it was given."""

    def __init__(self, session: Session) -> None:
        self.spec = session.spec
        self.session = session
        self.timesteps: list[float] = []
        self.rows: list[int] = []

    def _count(self, feeds: Mapping[str, np.ndarray]) -> None:
        self.timesteps += [float(feeds["timestep"][0])] if "timestep" in feeds else []
        self.rows.append(len(next(iter(feeds.values()))))

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._count(feeds)
        return self.session.run(feeds)

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        run = self.session.hold(feeds)

        def counted(others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            self._count(others)
            return run(others)

        return counted

    @property
    def memory_bytes(self) -> int:
        return self.session.memory_bytes

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], dict[str, EngineSource]]:
    """The small model's UNet with seeded weights, by target and whether it is hoisted."""
    made: dict[tuple[str, bool], dict[str, EngineSource]] = {}
    for target in ("ort-cpu", "cpu"):
        for hoisted in (False, True):
            component = Component(SPEC, load_graph("unet"))
            run_passes((*canonical_passes(), *fusion_passes("unet")), component.model)
            parts = hoist_component(component)[0] if hoisted else (component,)
            folder = tmp_path_factory.mktemp("engines")
            for part in parts:
                run_passes(lowering_passes(TARGETS[target].backend), part.model)
                built = build_engine(part, TARGETS[target], folder / part.spec.name)
                files = tuple(folder / part.spec.name / name for name in built.files)
                source = EngineSource(part.spec, TARGETS[target].backend, files, built.options)
                made.setdefault((target, hoisted), {})[part.spec.name] = source
    return made


@pytest.fixture(scope="module")
def make_networks(engines: dict[tuple[str, bool], dict[str, EngineSource]]) -> Callable[..., Any]:
    def make(target: str, hoisted: bool) -> tuple[Networks, dict[str, Counting]]:
        loaded: dict[str, Counting] = {}

        def load(name: str) -> Counting:
            loaded[name] = Counting(open_session(engines[target, hoisted][name], threads=1))
            return loaded[name]

        specs = {name: source.spec for name, source in engines[target, hoisted].items()}
        return Networks(specs, load), loaded

    return make


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Everything around the UNet; no engine of it is run: prompts come as numbers."""
    folder = tmp_path_factory.mktemp("pipeline")
    theirs = build_diffusers(ARCHITECTURES[0], folder)

    def refuse(name: str) -> Session:
        raise AssertionError(name)

    return Pipeline(
        tokenizer=load_tokenizer(folder / "tokenizer"),
        schedule=schedule_from_config(dict(theirs.scheduler.config)),
        settings=settings_of(theirs),
        specs={**specs_of(theirs), "unet": SPEC},
        load_session=refuse,
    )


def draw(
    pipeline: Pipeline, networks: Networks, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[np.ndarray, list[DenoisingStep]]:
    """Latents, clipped to the range that pictures have, and the steps."""
    steps: list[DenoisingStep] = []
    plan = pipeline.plan(PROMPTS, NEGATIVE, seed=5, guidance_scale=3.0, height=32, width=64, **options)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "networks", networks)
        patch.setattr(pipeline, "encode", embed)
        return np.clip(pipeline.denoise(plan, on_step=steps.append), -1, 1), steps


def embed(prompts: list[str]) -> np.ndarray:
    return np.stack(
        [np.random.default_rng(len(each)).standard_normal((77, WIDTH), dtype=np.float32) for each in prompts]
    )


@pytest.mark.parametrize("target", ["ort-cpu", "cpu"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 6), ("euler", 5), ("dpmpp-2m", 5), ("lcm", 4)])
def test_pictures_equal_those_of_the_classic_interface(
    pipeline: Pipeline, make_networks: Any, monkeypatch: pytest.MonkeyPatch, target: str, sampler: str, steps: int
) -> None:
    (classic, _), (hoisted, loaded) = make_networks(target, False), make_networks(target, True)
    wanted, _ = draw(pipeline, classic, monkeypatch, sampler=sampler, steps=steps)
    found, told = draw(pipeline, hoisted, monkeypatch, sampler=sampler, steps=steps)
    assert wanted.std() > 0.1, "the pictures show nothing"
    assert 10 * np.log10(4 / max(float(((found - wanted) ** 2).mean()), 1e-20)) >= 60
    assert loaded["unet_prompt"].rows == [6]
    assert Counter(loaded["unet_timestep"].timesteps) == dict.fromkeys((step.timestep for step in told), 1)
    assert loaded["unet"].rows == [6] * steps
    assert not loaded["unet"].timesteps, "the UNet takes no timestep"
    again = loaded["unet"].run(told[-1].feeds)["out_sample"]
    np.testing.assert_array_equal(again, told[-1].output)
    hoisted.release()
    classic.release()


@pytest.mark.parametrize("target", ["ort-cpu", "cpu"])
def test_predictors_of_one_engine_may_be_used_in_turn(make_networks: Any, target: str) -> None:
    networks, loaded = make_networks(target, True)
    generator = np.random.default_rng(1)
    sample = generator.standard_normal((2, CHANNELS, 8, 4), dtype=np.float32)
    conditions = [{"encoder_hidden_states": embed(["a" * n, "b" * (n + 1)])} for n in (1, 7)]
    expected = [networks.predict(sample, 31.0, each) for each in conditions]
    assert np.abs(expected[0] - expected[1]).max() > 1e-3, "the prompts must matter"
    predictors = [networks.predictor(each, steps=3, timesteps=[31.0, 700.0, 31.0]) for each in conditions]
    before = len(loaded["unet_timestep"].timesteps)
    for _ in range(2):
        for predict, wanted in zip(predictors, expected, strict=True):
            np.testing.assert_array_equal(predict(sample, 31.0), wanted)
            np.testing.assert_array_equal(predict(sample, 31.0), wanted)
    assert len(loaded["unet_timestep"].timesteps) == before
    assert np.abs(predictors[0](sample, 99.0) - expected[0]).max() > 1e-3, "a timestep that was not announced"
    assert loaded["unet_timestep"].timesteps[-1] == 99.0
    networks.release()


def test_timesteps_are_prepared_once_for_all_pictures(make_networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    networks, loaded = make_networks("ort-cpu", True)
    sample = np.random.default_rng(4).standard_normal((2, CHANNELS, 8, 4), dtype=np.float32)
    conditions = [{"encoder_hidden_states": embed(["a" * n, "b"])} for n in (1, 7)]
    first = [networks.predictor(each, steps=2, timesteps=[31.0, 700.0])(sample, 31.0) for each in conditions]
    released = loaded["unet_timestep"]
    assert released.timesteps == [31.0, 700.0]
    monkeypatch.setattr("sdc.engines.networks._MOST_TIMESTEPS", 2)
    again = [networks.predictor(each, steps=1, timesteps=[31.0])(sample, 31.0) for each in conditions]
    assert loaded["unet_timestep"] is not released, "what is known already needs no engine in memory"
    assert loaded["unet_timestep"].timesteps == [31.0], "what is kept does not grow for ever"
    for wanted, found in zip(first, again, strict=True):
        np.testing.assert_array_equal(found, wanted)
    networks.release()


def test_one_call_takes_any_number_of_rows(make_networks: Any) -> None:
    (classic, _), (hoisted, loaded) = make_networks("ort-cpu", False), make_networks("ort-cpu", True)
    sample = np.random.default_rng(2).standard_normal((8, CHANNELS, 4, 8), dtype=np.float32)
    conditions = {"encoder_hidden_states": embed([str(10**n) for n in range(8)])}
    wanted = classic.predict(sample, 501.0, conditions)
    np.testing.assert_allclose(hoisted.predict(sample, 501.0, conditions), wanted, atol=1e-5 * np.abs(wanted).max())
    assert loaded["unet"].rows == [6, 2]
    with pytest.raises(InputError, match="encoder_hidden_states is missing"):
        hoisted.predict(sample, 501.0, {})
    with pytest.raises(InputError, match="prompt is unknown"):
        hoisted.predict(sample, 501.0, {**conditions, "prompt": sample})
    with pytest.raises(NumericalError, match="unet_prompt gave NaN"):
        hoisted.predict(sample, 501.0, {"encoder_hidden_states": np.full((8, 77, WIDTH), np.nan, np.float32)})


def test_a_prompt_engine_that_takes_fewer_rows_is_run_in_parts(make_networks: Any) -> None:
    networks, loaded = make_networks("ort-cpu", True)
    small = replace(networks.specs["unet_prompt"], dimensions={"B": DimensionRange(1, 2, 2)})
    parts = Networks({**networks.specs, "unet_prompt": small}, networks.session)
    sample = np.random.default_rng(3).standard_normal((5, CHANNELS, 4, 8), dtype=np.float32)
    conditions = {"encoder_hidden_states": embed([str(10**n) for n in range(5)])}
    wanted = networks.predict(sample, 12.0, conditions)
    np.testing.assert_allclose(parts.predict(sample, 12.0, conditions), wanted, atol=1e-5 * np.abs(wanted).max())
    assert loaded["unet_prompt"].rows == [5, 2, 2, 1]


def hoisted_specs() -> dict[str, ComponentSpec]:
    key = TensorSpec("prompt.0", "float32", ("B", 77, 8))
    row = TensorSpec("timestep.0", "float32", (1, 6))
    sample, timestep, states = SPEC.inputs
    return {
        "unet": replace(SPEC, inputs=(sample, key, row)),
        "unet_prompt": ComponentSpec("unet_prompt", (states,), (key,), {"B": SIZES["B"]}),
        "unet_timestep": ComponentSpec("unet_timestep", (timestep,), (row,), {}),
    }


def test_wiring_is_checked_by_names() -> None:
    specs = hoisted_specs()
    check_wiring(specs, place="here")
    check_wiring({"unet": SPEC}, place="here")
    check_wiring({}, place="here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda specs: {"unet": specs["unet"]}, "nothing provides the input 'prompt.0' of unet"),
        (lambda specs: {**specs, "unet_timestep": SPEC_OF_OTHERS}, "nothing provides the input 'timestep.0' of unet"),
        (lambda specs: {name: specs[name] for name in ("unet_prompt",)}, "unet_prompt has no unet to serve"),
        (
            lambda specs: {**specs, "unet_prompt": replace(specs["unet_prompt"], outputs=(OTHER_KEY,))},
            r"unet takes prompt.0 as float32 \['B', 77, 8\], unet_prompt gives float32 \['B', 77, 9\]",
        ),
        (
            lambda specs: {**specs, "unet_prompt": replace(specs["unet_prompt"], inputs=(OTHER_KEY,))},
            "nothing provides the input 'prompt.0' of unet_prompt",
        ),
        (
            lambda specs: {**specs, "unet_prompt": replace(specs["unet_prompt"], inputs=SPEC.inputs[:1])},
            "nothing provides the input 'sample' of unet_prompt",
        ),
        (
            lambda specs: {
                **specs,
                "unet_timestep": replace(specs["unet_timestep"], outputs=specs["unet_prompt"].outputs),
            },
            "two engines beside the UNet give one name",
        ),
    ],
)
def test_wiring_that_does_not_fit_is_refused(change: Any, message: str) -> None:
    with pytest.raises(BundleError, match=f"here: {message}"):
        check_wiring(change(hoisted_specs()), place="here")


OTHER_KEY = TensorSpec("prompt.0", "float32", ("B", 77, 9))
SPEC_OF_OTHERS = ComponentSpec("unet_timestep", SPEC.inputs[1:2], (TensorSpec("other", "float32", (1, 6)),), {})


def test_targets_of_a_bundle_have_one_interface() -> None:
    specs = hoisted_specs()
    assert common_specs({"cpu": specs.values(), "rtx": specs.values()}) == specs
    with pytest.raises(ExportError, match="the engines for cpu and rtx have different interfaces: unet_prompt"):
        common_specs({"cpu": specs.values(), "rtx": [*list(specs.values())[:1], *list(specs.values())[2:]]})
